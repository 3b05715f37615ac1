"""Pages that a person looks at: the report of runs, its figures and what it says of a comparison."""
