"""Looking at sources: are they whole (check), what is in them (stats), what do they look like (preview)."""
