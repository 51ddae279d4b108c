"""StochCA in timm's own engine: the pieces of its train script, in the order in which it calls them."""

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, NativeScaler, dispatch_clip_grad
from torch import nn

from stochca import StochCA
from stochca.losses import create_losses
from stochca.objective import Objective
from stochca.task import StochCATask
from tests.models import make_images, make_target, perturb

MIRO = [{"miro": {"weight": 0.5, "taps": [2, 4]}}, "l2_sp"]


def make_task(losses=(), p=0.5, stochca=None, smoothing=0.1, **kwargs):
    """A task whose source differs from its target."""
    model = StochCA(make_target(**kwargs), p=p, seed=3, **(stochca or {}))
    perturb(model.target, seed=1)
    criterion_kwargs = {"smoothing": smoothing}
    losses = create_losses(losses, model)
    return StochCATask(model, criterion_kwargs=criterion_kwargs, losses=losses, dtype=torch.float64)


def make_batch(seed=0, batch=4):
    labels = torch.randint(5, (batch,), generator=torch.Generator().manual_seed(seed))
    return make_images(batch, seed=10 + seed), labels


def train(task, steps, optimizer, scheduler=None, start=0):
    """As timm's loop; returns the losses."""
    task.train()
    losses = []
    for step in range(start, start + steps):
        result = task(*make_batch(step))
        optimizer.zero_grad()
        result["loss"].backward()
        dispatch_clip_grad(task.get_clip_parameters(), 1.0)
        optimizer.step()
        task.update_ema(step=step + 1)
        if scheduler is not None:
            scheduler.step_update(num_updates=step + 1)
        losses.append(result["loss"].item())
    return losses


def make_optimizer(task, **kwargs):
    return create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=1e-2, weight_decay=0.1, **kwargs)


def plan_of(task):
    return task.objective.model.plan.coins


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("losses", [[], MIRO], ids=["alone", "miro"])
def test_the_loss_is_the_criterion_on_stochca_and_its_companions(losses):
    task, by_hand = make_task(losses).train(), make_task(losses).train()
    images, labels = make_batch()
    result = task(images, labels)
    model = by_hand.objective.model
    taps = {tap for loss in by_hand.objective.companions for tap in loss.taps}
    outputs = model.forward_step(images, coins=plan_of(task), taps=taps)
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(outputs.logits, labels)
    terms = by_hand(images, labels)
    expected = expected + sum(terms[loss.name] for loss in by_hand.objective.companions)
    assert torch.equal(result["output"], outputs.logits)
    torch.testing.assert_close(result["loss"], expected, rtol=1e-12, atol=0)
    assert result["output"].shape == (4, 5)
    assert result["loss"].requires_grad


def test_the_target_evaluates_as_timm_does():
    task = make_task()
    images, labels = make_batch()
    evaluated = task.get_eval_model().eval()
    assert evaluated is task.objective.model.target
    reference = make_target()
    reference.load_state_dict(evaluated.state_dict())
    output = evaluated(images)
    assert torch.equal(output, reference.eval()(images))
    evaluator = task.create_evaluator()
    evaluator.update(output, labels)
    assert evaluator.compute()["top1"] == pytest.approx(100 * (output.argmax(1) == labels).double().mean())


def test_what_wraps_the_objective_is_not_evaluated():
    task = make_task()
    target = task.objective.model.target
    assert task.get_eval_model(task.trainable_module) is target
    assert task.get_eval_model(target) is target
    assert task.get_eval_model(ema=True) is None
    assert task.get_checkpoint_state(ema=True) == {}


def scales_of(optimizer, module, key):
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: group[key] for group in optimizer.param_groups for p in group["params"]}


def test_timms_optimizer_has_the_targets_groups():
    """Its layers, and what it spares from weight decay, under the names of the task's module."""
    task = make_task(MIRO)
    module, target = task.get_trainable_module(), task.objective.model.target
    for key, kwargs in {"weight_decay": {}, "lr_scale": {"layer_decay": 0.5}}.items():
        ours = scales_of(make_optimizer(task, **kwargs), module, key)
        plain = create_optimizer_v2(target, opt="adamw", lr=1e-2, weight_decay=0.1, **kwargs)
        theirs = scales_of(plain, target, key)
        assert len(set(theirs.values())) > 1
        assert {name: ours.pop(f"model.target.{name}") for name in theirs} == theirs
        assert ours  # of MIRO
        assert all(name.startswith("losses.0.") for name in ours)
    assert set(ours.values()) == {1.0}  # the head's


def test_clipping_leaves_out_the_classifier_and_keeps_the_losses():
    task = make_task(MIRO)
    names = {id(p): name for name, p in task.objective.named_parameters()}
    kept = {names[id(p)] for p in task.get_clip_parameters(exclude_head=True)}
    assert {names[id(p)] for p in task.get_clip_parameters()} - kept == {
        "model.target.head.weight", "model.target.head.bias",
    }  # fmt: skip
    assert kept | {"model.target.head.weight", "model.target.head.bias"} == set(names.values())


# While torch traces, which it does in warnings of its own.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be")
def test_compilation_keeps_names_and_results():
    plain, compiled = make_task(MIRO), make_task(MIRO)
    names = [name for name, _ in plain.get_trainable_module().named_parameters()]
    optimizers = [make_optimizer(task) for task in (plain, compiled)]
    evaluated = compiled.compile(backend="eager")
    assert [name for name, _ in compiled.get_trainable_module().named_parameters()] == names
    losses = [
        train(task, 3, optimizer) for task, optimizer in zip((plain, compiled), optimizers, strict=True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert compiled.get_eval_model() is evaluated
    images, _ = make_batch()
    with torch.no_grad():
        expected = plain.get_eval_model().eval()(images)
        torch.testing.assert_close(evaluated.eval()(images), expected, rtol=1e-9, atol=1e-9)
    ours, theirs = compiled.get_checkpoint_state(), plain.get_checkpoint_state()
    assert list(ours["state_dict"]) == list(theirs["state_dict"]) == list(make_target().state_dict())


def test_a_compiled_average_is_evaluated():
    task = make_task()
    task.setup_ema(decay=0.5)
    average = task.compile_ema(backend="eager")
    assert task.get_eval_model(ema=True) is average
    assert list(task.get_checkpoint_state(ema=True)["state_dict_ema"]) == list(make_target().state_dict())


def test_the_average_is_of_the_target_alone():
    task = make_task(MIRO)
    task.setup_ema(decay=0.75)
    target = task.objective.model.target
    expected = {name: t.clone() for name, t in target.state_dict().items()}
    optimizer = make_optimizer(task)
    for step in range(3):
        train(task, 1, optimizer, start=step)
        share = 0.75 if step else 0.0  # timm's average begins with the first step
        for name, t in target.state_dict().items():
            expected[name].mul_(share).add_(t, alpha=1 - share)
    average = task.get_eval_model(ema=True)
    for name, t in average.module.state_dict().items():
        torch.testing.assert_close(t, expected.pop(name), rtol=1e-9, atol=1e-12)
    assert not expected
    assert not any(torch.equal(p, q) for p, q in zip(average.parameters(), target.parameters(), strict=True))


def saver_of(task, optimizer, folder):
    return CheckpointSaver(
        task.get_trainable_module(), optimizer, amp_scaler=None, checkpoint_dir=str(folder), task=task
    )


def test_timms_checkpoints_are_of_a_plain_model(tmp_path):
    task = make_task(MIRO)
    task.setup_ema(decay=0.5)
    optimizer = make_optimizer(task)
    train(task, 2, optimizer)
    saver_of(task, optimizer, tmp_path).save_checkpoint(0, metric=1.0)
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert_equal(saved["state_dict"], task.objective.model.target.state_dict())
    assert saved["task_state"]["coins"] == 2
    assert "task_state_ema" not in saved
    assert {name.split(".")[0] for name in saved["task_state"]["losses"]} == {"0"}  # of MIRO alone
    size = {"img_size": 24, "patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    model = timm.create_model(
        "vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "model_best.pth.tar"), **size
    )
    average = task.get_eval_model(ema=True).module.state_dict()  # what timm prefers
    assert_equal(model.state_dict(), {name: t.float() for name, t in average.items()})


def test_a_resumed_task_continues_exactly(tmp_path):
    options = {"losses": MIRO, "stochca": {"per": "sample"}, "proj_drop_rate": 0.0}
    whole, first, second = (make_task(**options) for _ in range(3))
    runs = {}
    for name, task in {"whole": whole, "first": first, "second": second}.items():
        task.setup_ema(decay=0.5)
        optimizer = make_optimizer(task, layer_decay=0.7)
        scheduler, _ = create_scheduler_v2(
            optimizer, num_epochs=3, step_on_epochs=False, updates_per_epoch=2, warmup_epochs=1
        )
        runs[name] = task, optimizer, scheduler
    expected = train(whole, 6, *runs["whole"][1:])
    train(first, 2, *runs["first"][1:])
    saver_of(first, runs["first"][1], tmp_path).save_checkpoint(0, metric=1.0)
    perturb(second.objective, seed=5)

    _, optimizer, scheduler = runs["second"]
    path = str(tmp_path / "last.pth.tar")
    assert resume_task_checkpoint(second, path, optimizer, log_info=False) == 1
    load_task_ema_checkpoint(second, path)
    scheduler.step_update(num_updates=2)
    assert train(second, 4, optimizer, scheduler, start=2) == expected[2:]
    for ema in (False, True):
        key = "state_dict_ema" if ema else "state_dict"
        ours, theirs = (task.get_checkpoint_state(ema=ema) for task in (second, whole))
        assert_equal(ours[key], theirs[key])
    assert second.get_task_state()["coins"] == 6
    assert_equal(second.get_task_state()["losses"], whole.get_task_state()["losses"])


def test_timms_loss_scaler_drives_a_task():
    task = make_task().float()
    assert (task.device.type, task.dtype) == ("cpu", torch.float32)
    scaler, optimizer = NativeScaler(device="cpu"), make_optimizer(task)
    before = task.objective.model.target.head.weight.detach().clone()
    for step in range(12):  # of which the first overflow
        images, labels = make_batch(step)
        with torch.autocast("cpu", torch.float16):
            loss = task(images.float(), labels)["loss"]
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=1.0, parameters=task.get_clip_parameters())
    assert not torch.equal(task.objective.model.target.head.weight, before)
    assert all(p.isfinite().all() for p in task.get_trainable_module().parameters())


# Of two processes with two images each, and of one with all four.
DISTRIBUTED = {
    "plain": {},
    "miro": {"losses": MIRO},
    "qk norm": {"qk_norm": True},
    "per sample": {"stochca": {"per": "sample"}},
    "average pooling": {"global_pool": "avg", "class_token": False},
}
STEPS = 3


def gradients_of_steps(task, images_of):
    """For each step the gradients by name, and the coins."""
    module = task.get_trainable_module()
    task.train()
    steps = []
    for step in range(STEPS):
        module.zero_grad()
        images, labels = make_batch(step)
        own = images_of(step)
        task(images[own], labels[own])["loss"].backward()
        gradients = {name: p.grad.clone() for name, p in task.objective.named_parameters()}
        steps.append((gradients, plan_of(task)))
    return steps


def distributed_worker(rank, folder):
    """Gradients of all cases, in one of two processes whose sources were not made alike."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, options in DISTRIBUTED.items():
        task = make_task(**options)
        if rank:
            perturb(task.objective.model.target, seed=7)
            perturb(task.objective.model.source, seed=8)
        assert task.prepare_distributed() is task
        with task.no_sync():
            task.train()(*make_batch())["loss"].backward()
        task.objective.model.coins.step = 0
        result = gradients_of_steps(task, lambda step: slice(2 * rank, 2 * rank + 2))
        torch.save(result, f"{folder}/{name}.{rank}.pt")
        torch.save(list(task.get_checkpoint_state()["state_dict"]), f"{folder}/{name}.{rank}.names.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(distributed_worker, args=(folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_processes_have_the_gradients_of_the_joined_batch(two, name):
    expected = gradients_of_steps(make_task(**DISTRIBUTED[name]), lambda step: slice(None))
    results = [torch.load(two / f"{name}.{rank}.pt") for rank in range(2)]
    for (gradients, coins), *ours in zip(expected, *results, strict=True):
        for rank, (others, other_coins) in enumerate(ours):
            for coin, other in zip(coins, other_coins, strict=True):
                whole, part = (torch.as_tensor(c).expand(n) for c, n in ((coin, 4), (other, 2)))
                assert torch.equal(part, whole[2 * rank : 2 * rank + 2])
            assert others.keys() == gradients.keys()
            for key, gradient in gradients.items():
                torch.testing.assert_close(others[key], gradient, rtol=1e-9, atol=1e-12)
    seen = torch.stack([torch.as_tensor(coin).expand(4) for _, coins in expected for coin in coins])
    assert seen.any()
    assert not seen.all()
    target = make_task(**DISTRIBUTED[name]).objective.model.target
    assert torch.load(two / f"{name}.0.names.pt") == list(target.state_dict())


def test_an_objective_is_what_is_distributed():
    task = make_task()
    assert isinstance(task.get_trainable_module(), Objective)
    assert not any("source" in name for name, _ in task.named_parameters())
