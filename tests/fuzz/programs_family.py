"""Programs: a few models that share modules, and one step after another that uses, trains, edits, copies or patches.

What a call leaves behind is what the next one may trip over, so here the steps are mixed: results are compared after
each. Only ours is accelerated, refreshed and switched off and on in between, which must change nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import edits_family
import pipelines
import torch
from compare import Sized
from draw import Draw, Raised
from losses_family import loose
from models_family import of_parameters
from sentence_transformers import SentenceTransformer, losses
from sentence_transformers.sentence_transformer import modules as st_modules
from surroundings import context
from torch import nn

import sentfast

MOST_STEPS = 14
MOST_MODELS = 4


class Program:
    """The models of a program, and what its steps leave for later ones."""

    def __init__(self, draw: Draw):
        self.draw = draw
        self.calm = draw.one_of("manner", (True, False))
        self.models = [pipelines.sentence_transformer(draw, dropout=0.0)]
        self.optimizers: dict[int, Any] = {}
        self.hooks: list[Any] = []
        draw.finally_(self.close)

    def model(self) -> Any:
        return self.models[self.draw.integer("which model", 0, 99) % len(self.models)]

    def add(self, model: Any) -> None:
        if len(self.models) < MOST_MODELS:
            self.models.append(model)

    def texts(self, name: str = "texts") -> list[str]:
        return pipelines.texts(self.draw, name, self.draw.one_of("count", (3, 1, 8)))

    def close(self) -> None:
        if self.draw.ours:  # anew, since what was patched by others at the time was left alone
            sentfast.disable()
            sentfast.enable()
        self.unhook()

    def unhook(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()


Step = Callable[[Program], Any]


def case(draw: Draw) -> dict[str, Any]:
    program = Program(draw)
    seen: dict[str, Any] = {}
    for number in range(draw.integer("steps", 2, MOST_STEPS)):
        with draw.step(number):
            name = draw.one_of("step", CALM if program.calm else WILD)
            out = draw.attempt(STEPS[name], program)
            # What ours alone does is no result.
            seen[f"{number}. {name}"] = None if name in OURS and not isinstance(out, Raised) else out
    for number, model in enumerate(program.models):
        seen[f"model {number}"] = {
            "modes": [module.training for module in model.modules()],
            "frozen": [p.requires_grad for p in model.parameters()],
            "embeddings": draw.attempt(model.encode, ["the query", "a market fell : a cat naps"]),
        }
    return seen


# Uses


def nothing(program: Program) -> None:
    pass


def encode(program: Program) -> Any:
    draw, model = program.draw, program.model()
    options: dict[str, Any] = {"batch_size": draw.one_of("batch_size", (32, 1, 2))}
    if draw.chance("tensor", 0.3):
        options["convert_to_tensor"] = True
    if draw.chance("normalised", 0.2):
        options["normalize_embeddings"] = True
    texts = program.texts()
    with context(draw):
        return plain(model.encode(texts, **options))


def features(program: Program) -> Any:
    """Called as a module, in whatever mode it is."""
    model = program.model()
    batch = model.preprocess(program.texts())
    with context(program.draw):
        return plain(model(batch)["sentence_embedding"])


def base(program: Program) -> Any:
    """The transformer alone, without padding: rows of padding are ours to leave out."""
    model = program.model()
    batch = model.preprocess(program.texts()[:1])
    with context(program.draw):
        out = model[0].model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return plain(out[0])


def two_at_once(program: Program) -> Any:
    """From two threads."""
    work = [(program.models[0], program.texts("first")), (program.models[-1], program.texts("second"))]
    found: list[Any] = [None, None]

    def run(place: int) -> None:
        model, texts = work[place]
        try:
            found[place] = plain(model.encode(texts))
        except Exception as error:
            found[place] = Raised(error)

    # In a copy of this context each, since `disabled` is of a context.
    threads = [threading.Thread(target=contextvars.copy_context().run, args=(run, place)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def plain(x: Any) -> Any:
    """A result that is not changed by what comes later and holds no graph."""
    return (x.requires_grad, x.detach().clone()) if isinstance(x, torch.Tensor) else copy.copy(x)


# Training


def train(program: Program) -> Any:
    """A step of an optimizer that stays; now and then the gradients of a step before are still there."""
    draw, model = program.draw, program.model()
    loss, columns, labels = loss_of(draw, model)
    model.train()
    if not draw.chance("accumulated", 0.2):
        model.zero_grad(set_to_none=not draw.chance("zeros", 0.2))
    batch = [model.preprocess(pipelines.texts(draw, f"column {i}", 4)) for i in range(columns)]
    # What is checkpointed runs again in backward, outside of the context.
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    with contextlib.nullcontext() if checkpointed else context(draw):
        value = loss(batch, labels)
    value.backward()
    seen = {"loss": Sized(value.detach().clone(), 20.0), "gradients": loose(of_parameters(model), 20.0, cancels=True)}
    kind = draw.one_of("optimizer", ("SGD", "none", "AdamW", "foreach", "by hand"))
    if kind == "by hand":
        for p in model.parameters():
            if p.grad is not None:
                p.data -= 0.01 * p.grad.data
    elif kind != "none":
        optimizer(program, model, kind).step()
    if not draw.chance("stays in training mode", 0.2):
        model.eval()
    return seen


def loss_of(draw: Draw, model: Any) -> tuple[Any, int, Any]:
    labels = draw.real(torch.tensor([0.0, 1.0, 0.5, 0.2]))
    target = draw.normal("target", 4, model.get_embedding_dimension() or 8)
    makers: dict[str, Callable[[], tuple[Any, int, Any]]] = {
        "MNRL": lambda: (losses.MultipleNegativesRankingLoss(model), 2, None),
        "cosine": lambda: (losses.CosineSimilarityLoss(model), 2, labels),
        "MSE": lambda: (losses.MSELoss(model), 1, target),
        "own": lambda: (lambda batch, _: model(batch[0])["sentence_embedding"].square().mean(), 1, None),
        "triplets": lambda: (losses.MultipleNegativesRankingLoss(model), 3, None),
    }
    return makers[draw.one_of("loss", tuple(makers))]()


def optimizer(program: Program, model: Any, kind: str) -> Any:
    """Made once for a model, of the parameters that it had then.

    AdamW divides by the size of the gradient, so that of a gradient of roundings a whole step is made: eps is large.
    """
    made = program.optimizers.get(id(model))
    if made is None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if kind == "AdamW":
            made = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-2)
        else:
            made = torch.optim.SGD(parameters, lr=1e-2, foreach=kind == "foreach")
        program.optimizers[id(model)] = made
    return made


def no_gradients(program: Program) -> None:
    program.model().zero_grad()


# Copies


def deep_copy(program: Program) -> None:
    program.add(copy.deepcopy(program.model()))


def pickled(program: Program) -> None:
    program.add(pickle.loads(pickle.dumps(program.model())))


def shared(program: Program) -> None:
    """Another pipeline around the same transformer."""
    model = program.model()
    parts = [*list(model)[:2], st_modules.Normalize()]
    program.add(SentenceTransformer(modules=parts, device="cpu").eval())


def same_weights(program: Program) -> None:
    model, other = program.model(), program.models[0]
    other.load_state_dict(copy.deepcopy(model.state_dict()))


# Edits


def edit(program: Program) -> Any:
    """One of the family of edits, of the transformer or the whole pipeline."""
    draw, model = program.draw, program.model()
    inside = not draw.chance("of the pipeline", 0.3)
    target = model[0].model if inside else model
    kinds = (edit_weight, edits_family.edit_module, edits_family.edit_value, edits_family.edit_patch)
    chosen = draw.one_of("kind of edit", kinds[:1] if program.calm else kinds if inside else kinds[:2])
    with torch.no_grad():
        chosen(draw, target, model[0].model.config.model_type)


def edit_weight(draw: Draw, base: nn.Module, kind: str) -> None:
    """Not to half precision and back: of trained weights, which of two halves is nearer is left to rounding."""
    edits_family.edit_weight(draw, base, kind, tuple(x for x in edits_family.ALL_ROADS if x != "half and back"))


def unpatch(program: Program) -> None:
    """Everything that was patched is as before."""
    program.draw.unpatch()
    program.unhook()


def global_hook(program: Program) -> None:
    """On every module of the process."""

    def hook(module: nn.Module, inputs: Any, out: Any) -> Any:
        return 2 * out if isinstance(module, nn.LayerNorm) else None

    program.hooks.append(nn.modules.module.register_module_forward_hook(hook))


def gradient_hook(program: Program) -> None:
    """A parameter whose gradient is halved, or written to when it is there."""
    draw, model = program.draw, program.model()
    parameters = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
    if not parameters:
        return
    chosen = parameters[draw.integer("which parameter", 0, 9999) % len(parameters)]
    if draw.chance("when it is there"):
        program.hooks.append(chosen.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(3)))
    else:
        program.hooks.append(chosen.register_hook(lambda grad: grad / 2))


def patch_pipeline(program: Program) -> None:
    """A module of sentence-transformers, by its class or the object, gives twice as much."""
    draw, model = program.draw, program.model()
    chosen = list(model)[draw.integer("which module", 0, 99) % len(model)] if draw.chance("a module", 0.8) else model
    owner = chosen if draw.chance("the object", 0.4) else type(chosen)
    original = owner.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        for name in ("token_embeddings", "sentence_embedding"):
            if isinstance(out.get(name), torch.Tensor):
                out[name] = 2 * out[name]
                break
        return out

    draw.patch(owner, "forward", doubled)


def checkpointing(program: Program) -> None:
    base = program.model()[0].model
    if program.draw.chance("off", 0.3):
        base.gradient_checkpointing_disable()
    else:
        reentrant = program.draw.chance("reentrant", 0.3)
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})


def layers(program: Program) -> None:
    """Of the first list of modules: one dropped, two exchanged, one used twice."""
    draw, model = program.draw, program.model()
    lists = [(name, m) for name, m in model[0].named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return
    found = lists[0][1]
    how = draw.one_of("what becomes of the layers", ("exchanged", "dropped", "twice", "a copy"))
    if how == "exchanged":
        found[0], found[len(found) - 1] = found[len(found) - 1], found[0]
    elif how == "dropped" and len(found) > 1:
        del found[len(found) - 1]
    elif how == "twice":
        found[len(found) - 1] = found[0]
    elif how == "a copy":
        found[0] = copy.deepcopy(found[0])


def reparametrize(program: Program) -> None:
    draw, model = program.draw, program.model()
    linears = [m for m in model[0].modules() if isinstance(m, nn.Linear)]
    chosen = linears[draw.integer("which linear", 0, 999) % len(linears)]
    how = draw.one_of("how", ("pruned", "pruned for good", "weight norm", "removed"))
    if how.startswith("pruned"):
        nn.utils.prune.l1_unstructured(chosen, "weight", amount=0.5)
        if how == "pruned for good":
            nn.utils.prune.remove(chosen, "weight")
    elif how == "weight norm":
        nn.utils.parametrizations.weight_norm(chosen)
    elif nn.utils.parametrize.is_parametrized(chosen):
        nn.utils.parametrize.remove_parametrizations(chosen, "weight")


def freeze(program: Program) -> None:
    draw, model = program.draw, program.model()
    state = draw.chance("thawed", 0.3)
    parts = [model, model[0], model[0].model, *[m for m in model[0].modules() if isinstance(m, nn.LayerNorm)]]
    parts[draw.integer("which part", 0, 99) % len(parts)].requires_grad_(state)


def mode(program: Program) -> None:
    program.model().train(program.draw.chance("training"))


def tail(program: Program) -> None:
    """The modules behind the transformer."""
    draw, model = program.draw, program.model()
    how = draw.one_of("the tail", ("normalised", "shorter", "pooling mode", "prompt", "new Dense"))
    poolings = [m for m in model if isinstance(m, st_modules.Pooling)]
    if how == "normalised":
        model.append(st_modules.Normalize())
    elif how == "shorter" and len(model) > 2:
        del model[-1]
    elif how == "pooling mode":
        poolings[0].pooling_mode = draw.one_of("mode", ("cls", "mean", "max"))
    elif how == "prompt":
        poolings[0].include_prompt = not poolings[0].include_prompt
    elif how == "new Dense":
        width = model.get_embedding_dimension()
        # Dense's default activation is one object for all of them, which would carry its mode from run to run.
        dense = draw.weights(st_modules.Dense(width, 12, activation_function=nn.Tanh()))
        model.append(draw.real(dense).to(next(model.parameters()).dtype))


def settings(program: Program) -> None:
    draw, model = program.draw, program.model()
    how = draw.one_of("setting", ("max_seq_length", "truncate_dim", "prompts", "padding side", "lower", "a word"))
    if how == "max_seq_length":
        model.max_seq_length = draw.one_of("tokens", (6, 12, 40))
    elif how == "truncate_dim":
        model.truncate_dim = draw.one_of("dimensions", (4, 2, None))
    elif how == "prompts":
        model.prompts = {"own": "the cat : "}
        model.default_prompt_name = draw.one_of("default", ("own", None))
    elif how == "padding side":
        model.tokenizer.padding_side = draw.one_of("side", ("left", "right"))
    elif how == "a word":
        model.tokenizer.add_tokens([draw.one_of("word", ("market", "fell :", "e"))])
    else:
        model[0].do_lower_case = not getattr(model[0], "do_lower_case", False)


# What ours alone does


def accelerate(program: Program) -> None:
    """Not of a model in half precision, whose copies may be late to show an edit."""
    model = program.model()
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    if program.draw.ours and not half:
        with contextlib.suppress(sentfast.UnsupportedModelError):
            sentfast.accelerate(model)


def refresh(program: Program) -> None:
    model = program.model()
    if program.draw.ours:
        sentfast.refresh(model)


def off(program: Program) -> None:
    if program.draw.ours:
        sentfast.disable()


def on(program: Program) -> None:
    if program.draw.ours:
        sentfast.enable()


OURS = {"accelerate": accelerate, "refresh": refresh, "off": off, "on": on}
# The first is the simplest; what stands twice is drawn twice as often. After a calm step our kernels run on.
CALM: tuple[str, ...] = (
    *("nothing", "encode", "encode", "features", "features", "base", "two at once", "train", "train", "no gradients"),
    *("gradient hook", "checkpointing", "deep copy", "pickled", "shared", "same weights"),
    *("edit", "edit", "freeze", "mode", "tail", "settings"),
    *OURS,
)
WILD = (*CALM, "edit", "unpatch", "unpatch", "patch pipeline", "global hook", "layers", "reparametrize")
STEPS: dict[str, Step] = {
    "nothing": nothing,
    "encode": encode,
    "features": features,
    "base": base,
    "two at once": two_at_once,
    "train": train,
    "no gradients": no_gradients,
    "deep copy": deep_copy,
    "pickled": pickled,
    "shared": shared,
    "same weights": same_weights,
    "edit": edit,
    "unpatch": unpatch,
    "global hook": global_hook,
    "patch pipeline": patch_pipeline,
    "gradient hook": gradient_hook,
    "checkpointing": checkpointing,
    "layers": layers,
    "reparametrize": reparametrize,
    "freeze": freeze,
    "mode": mode,
    "tail": tail,
    "settings": settings,
    **OURS,
}
