"""Triton kernels, installed as ``sentfast.kernels``; importing a family enters it into the table of operators."""

if __name__ != "sentfast.kernels":
    raise ImportError(
        f"this folder holds sentfast's Triton kernels and was imported as {__name__!r}. It hides the package of that"
        " name because Python was started in sentfast's repository: start it in another folder."
    )
