"""The matrix of `make test-all`: families x parallel degrees x disturbances x dtypes, outside of plain pytest."""
