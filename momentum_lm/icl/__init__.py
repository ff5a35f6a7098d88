"""In-context learning: prompts, demonstrations, scores and their calibration."""
