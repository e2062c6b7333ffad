"""Buckets, as the kernels walk them: queries and keys stay where they are, and are read in the order of their buckets.

What a query sees is then a range of places, less a range in the middle where it sees the others of its family. A
program takes queries that follow on one another there, and walks from the first place that one of them sees to the
last; no row of these ranges ever falls, so that the queries of some keys (for dK and dV) are a range as well.
"""
