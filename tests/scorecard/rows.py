"""The rows of the scorecard."""

from bench.environment import METHOD
from tests.scorecard.row import Row

KERNELS = ("stochca_kernels",)
STEP = (*METHOD, "stochca_kernels")

ROWS = (
    Row(
        "R1",
        "architectures of timm that StochCA drives, a small instance of each: logits in evaluation, in "
        "training at p = 0 with all tokens computed, and with `attn_layer=StochCAAttention` where timm "
        "takes one, are timm's own bit for bit, those of class rows alone in float64 to 1e-12; all others "
        "are refused",
        "all",
        "timm_parity.cases",
        STEP,
        at_least=273,
    ),
    Row(
        "R2",
        "random calls of the operator (0 to 4,097 tokens, empty batches, head sizes 16 to 128, permuted, "
        "expanded and misaligned layouts, coins, scales from 1e-8 to 1e4), interpreted kernels in float32 "
        "and float16, SDPA in bfloat16 too: errors against float64 at most 2 times those of eager torch, "
        "those of gradients 3 times where scores are below 2^20, or one rounding of what is added up",
        "0 of 2,000 off",
        "operator_cases.cases",
        KERNELS,
        at_least=2000,
    ),
    Row(
        "R3",
        "gradients eager, checkpointed, recomputed, compiled per block and under autocast, of "
        "self-attention, cross-attention and both: equal bit for bit, compiled ones in float32 to 1e-6, "
        "and from float64 at most 2 times as far as those of timm's eager blocks",
        "all",
        "gradient_parity.cases",
        STEP,
    ),
    Row(
        "R4",
        "repeats of forward and backward that differ in a bit",
        "0 of 250",
        "repeats.cases",
        STEP,
        at_least=250,
    ),
    Row(
        "R4-gpu",
        "repeats of forward and backward that differ in a bit",
        "0 of 10,000",
        "repeats.gpu_cases",
        STEP,
        at_least=10_000,
    ),
    Row(
        "R5",
        "`torch.library.opcheck` of every operator, 4 utilities, contiguous and permuted, float32 and "
        "float16; gradcheck and gradgradcheck of the reference; second order of the others refused by name",
        "all",
        "operator_contracts.cases",
        KERNELS,
    ),
    Row(
        "R6-gpu",
        "compute-sanitizer: errors of memcheck, racecheck, initcheck and synccheck over every kernel",
        "0",
        "sanitizer.gpu_cases",
        KERNELS,
        at_least=4,
    ),
    Row(
        "R7",
        "kernels whose compiled code, on 5 GPUs in bfloat16 and float32, computes every offset that can "
        "pass 2^31 elements in 64 bits, for strides up to 2^31 and lengths up to 2^23",
        "all",
        "offsets.cases",
        KERNELS,
    ),
    Row(
        "R7-gpu",
        "kernels run over more than 2^31 elements",
        "all",
        "offsets.gpu_cases",
        KERNELS,
    ),
    Row(
        "R8",
        "NaN and Inf in an input: outputs and gradients not finite where the reference's are, and nowhere "
        "else (an infinity may spread less through gradients of few rows); none leaks from poisoned padding "
        "or from a pair that no coin selects",
        "0 leaks",
        "nonfinite.cases",
        KERNELS,
    ),
    Row(
        "R9",
        "training runs killed (SIGKILL) at random moments, also while they save, also resumed with another"
        " number of workers: final weights identical to those of a run that was not",
        "100 of 100",
        "kills.cases",
        at_least=100,
    ),
    Row(
        "R10",
        "SIGTERM, SIGINT, full disks, folders that cannot be written: the exit code tells, the previous "
        "checkpoint is whole",
        "24 of 24",
        "interruptions.cases",
        at_least=24,
    ),
    Row(
        "R11",
        "damaged checkpoints (truncated, bits flipped, wrong keys, shapes and kinds, made-up headers, "
        "another model, pickled code), wherever they are read, that load silently or run code",
        "0 of 1,000",
        "damaged_checkpoints.cases",
        at_least=1000,
    ),
    Row(
        "R12",
        "damaged and unusual images (truncated, empty, text, CMYK, palette, 16 bits, animated, huge, "
        "bombs): read as they look, or refused by name",
        "all",
        "damaged_images.cases",
        at_least=250,
    ),
    Row(
        "R13",
        "mistakes of users refused by an error that says what was wanted and what came",
        "at least 150, all",
        "mistakes.cases",
        at_least=150,
    ),
    Row(
        "R14",
        "two processes, 50 steps: equal weights on both, equal to the joined batch to 1e-6; one killed: "
        "the other ends within 30 s, and torchrun resumes",
        "7 of 7",
        "ranks.cases",
        at_least=7,
    ),
    Row(
        "R15",
        "graphs of a block in training (with a class token 2 more, of its row alone); recompilations and "
        "graph breaks in 1,000 random steps after a warm-up: coins, last batches, image sizes, evaluations",
        "2; 0",
        "recompilations.cases",
        STEP,
    ),
    Row(
        "R16",
        "growth of memory at the same point of a step, over 2,000 steps of random coins, shapes, losses "
        "and evaluations",
        "0 B on the device, under 1 KB per step on the host",
        "memory.cases",
    ),
    Row(
        "R17",
        "keys of the source in a checkpoint; difference of exported models in stock timm, ONNX Runtime, "
        "torch.export",
        "0; at most 1e-5",
        "exports.cases",
    ),
    Row(
        "R18",
        "faults planted on purpose that the ordinary tests notice",
        "at least 25, 95 %",
        "planted_faults.cases",
        ("stochca", "stochca_kernels", "tests/mutants"),
        at_least=25,
        allowed=0.05,
    ),
    Row(
        "R19",
        "line and branch coverage of `stochca` and `stochca_kernels`, interpreted kernels included; unsafe"
        " loads found in the source",
        "95 %; 0",
        "coverage.cases",
    ),
    Row(
        "R20",
        "a small ViT trained 200 steps with the kernels and with SDPA: from the reference at most 4 times "
        "as far as runs of it in which attention differs by one rounding, float32 and float16",
        "all",
        "training.cases",
        STEP,
    ),
    Row(
        "R20-gpu",
        "a small ViT trained 500 steps with the kernels: from the reference at most 4 times as far as runs"
        " of it in which attention differs by one rounding, float32, float16 and bfloat16",
        "all",
        "training.gpu_cases",
        STEP,
    ),
    Row(
        "R21",
        "oldest and newest supported Python, torch, timm, Triton and NumPy; wheel and sdist installed into"
        " empty environments and tested there; known vulnerabilities of the dependencies",
        "green; 0",
        "matrix.cases",
        ("stochca", "stochca_kernels", "setup.py"),
    ),
)
