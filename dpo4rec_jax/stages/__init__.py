"""The stages of a round; each reads artifacts of the workspace and leaves its own."""
