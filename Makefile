PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: repro test lint docs ui

repro: $(READY)
	. $(VENV)/bin/activate && python -m pipeline repro && python -m pipeline track
	@echo "Report: reports/index.html (tables in reports/README.md)"
	@echo "Runs:   make ui"

test: $(READY)
	. $(VENV)/bin/activate && pytest -n auto --dist loadfile --durations 10

lint: $(READY)
	. $(VENV)/bin/activate && ruff check . && ruff format --check . && mypy

# The documentation as a site, in site/index.html; a broken link is an error. The theme's own announcement is left out.
docs: $(READY)
	. $(VENV)/bin/activate && NO_MKDOCS_2_WARNING=1 python -m mkdocs build
	@echo "Documentation: site/index.html"

# The plain equivalent of `make ui` is in docs/getting-started.md; the UI listens on the loopback address only.
ui: $(READY)
	. $(VENV)/bin/activate && mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" --host 127.0.0.1 --port 5000

$(READY): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[test,docs]'
	touch $@
