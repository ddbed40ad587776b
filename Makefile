# The checks of the project: each command has its one home here, and .ci/run and the workflow call it.
.PHONY: lint types docs test slow tables

lint: # style and formatting
	ruff check
	ruff format --check

types: # annotations
	mypy

docs: # the site, in build/site/; a broken link or a missing page is an error
	mkdocs build --strict

test: # the fast tests
	pytest

slow: # the tests that take minutes
	pytest -m slow

tables: # README's tables of groups and methods, from conf/
	python -m docs.tables README.md
