"""Reports of runs and studies as pages for a browser."""
