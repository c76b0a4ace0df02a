"""Ray and object stores: nothing here knows what a search is."""
