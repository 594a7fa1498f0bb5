"""Measurements, side by side in one run; never assertions. ``make bench`` runs all of them."""
