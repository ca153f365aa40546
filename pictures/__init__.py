"""The pictures that `visualize.py` makes, a file for each kind; they need matplotlib, and read nothing but records."""
