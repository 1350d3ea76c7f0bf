"""Where models, text and tasks come from: an alias, a folder, a hub, a package."""
