"""The recipe: what the user wrote, validated before anything heavy is imported."""
