"""`moc bench`: what methods cost side by side, on random weights of the recipe's shapes."""
