"""Everything that a person looks at: the run page, the comparison page, terminal panels, charts and dashboards."""
