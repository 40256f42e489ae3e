"""Trainings of an oracle, step by step."""

from tests.oracle import features


class Batches:
    """The oracle's batches of each epoch, as `heba.fit.features.train_views` takes them; `kept` has the module's
    parameters after each step, the first of them at 1."""

    def __init__(self, module, epochs):
        self.module, self.epochs, self.kept = module, iter(epochs), {}

    def __call__(self, generator=None):
        for rows in next(self.epochs):
            yield rows
            self.kept[len(self.kept) + 1] = {
                name: p.detach().clone() for name, p in self.module.named_parameters()
            }


def differences(kept, tensors, prefix, names):
    """How far the parameters of `names` are from each of the tensors <prefix>step<i>.<name>, by its key."""
    found = {}
    for key in tensors:
        step, _, name = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix + "step") and name in names:
            found[key] = features.relative(kept[int(step.removeprefix("step"))][names[name]], tensors[key])
    return found
