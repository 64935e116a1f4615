"""Data: shards, the stream of packed rows, and the embedded data sets. Imports `bestiary.schema` only."""
