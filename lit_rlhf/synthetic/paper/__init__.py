"""The paper in miniature: what its world adds to the quickstart's, and the measurements of its figures."""
