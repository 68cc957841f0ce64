"""The mathematics of Mixture-of-Control on plain tensors (torch only, no models, no recipes)."""
