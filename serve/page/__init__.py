"""The playground at `/`: static files, and how they are served. docs/playground.md says what it does."""
