"""What a person checks of a cluster before spending GPU hours on it."""
