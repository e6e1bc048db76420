"""Triton kernels, installed as ``sentfast.kernels``; importing a family enters it into the table of operators."""

if __name__ != "sentfast.kernels":

    def __getattr__(name: str) -> object:
        """Says why Hugging Face's package of this name is hidden; dunder look-ups stay harmless."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"{name!r} was looked up in sentfast's folder of Triton kernels, which hides the package `kernels` because"
            " Python was started in sentfast's repository: start it in another folder"
        )
