"""Triton's interpreter, as quick as the tests need it."""

from triton.runtime import interpreter


def patch_modules_once() -> None:
    """Let helpers of kernels run without more ado.

    At every call of one Triton puts its language into the modules that the helper sees, and leaves it there.
    Once is enough for each of them, and all the other times take up to half of the time of a test.
    """
    modules = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in modules:
            modules.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
