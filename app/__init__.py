"""zero-to-one: from raw text to a served private language model, on one Ray cluster."""
