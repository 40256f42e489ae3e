"""Shared fixtures. `HEBA_SHARED` (default ../shared) holds the full oracle files; a clone has a subset."""
