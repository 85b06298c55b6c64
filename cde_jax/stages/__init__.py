"""The stages of a run: each reads named files of the work directory and leaves named files there."""
