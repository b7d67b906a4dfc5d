"""How rewritten networks are fitted, and how it is decided what to rewrite and how far to go."""
