"""`python -m qapbench.lm_eval`: lm-eval's own command, which knows the model `qapbench`.

lm-eval finds the models of other packages neither by an entry point nor by `--include_path`: a model has to be
registered before its command runs. All arguments are those of `lm-eval`.
"""

from __future__ import annotations

MODEL = "qapbench.running.lm_model:QapbenchLM"


def register() -> None:
    """Make lm-eval know the model `qapbench`, which is imported when it is used."""
    from lm_eval.api.registry import model_registry

    if "qapbench" not in model_registry:
        model_registry.register("qapbench", target=MODEL)


def main() -> None:
    """Run lm-eval's command."""
    import sys

    from lm_eval.__main__ import cli_evaluate

    from qapbench.errors import UserError

    register()
    try:
        cli_evaluate()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
