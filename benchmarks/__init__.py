"""The same work done by the project and by its peers; see benchmarks/README.md."""
