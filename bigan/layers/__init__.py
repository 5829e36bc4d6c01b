"""Building blocks of networks. No forward writes a buffer; state changes are explicit functions."""
