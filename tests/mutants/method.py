"""Faults of the method."""

from tests.mutants.mutant import Mutant

ATTENTION = "stochca/attention.py"
BLOCK = "stochca/block.py"
MODEL = "stochca/model.py"
INTERFACE = "stochca/timm_interface.py"
QKV = "stochca/qkv.py"
LORA = "stochca/lora.py"
PLAN = "stochca/plan.py"
VIT = "stochca/vit.py"
RECOMPUTE = "stochca/recompute.py"
PRECISION = "stochca/precision.py"
MEMORY = ("tests/method/test_memory.py",)
EXACT = ("tests/method/test_exact.py",)
TRAINING = ("tests/method/test_training.py",)
RANKS = ("tests/scorecard/test_rows.py", "-k", "R14-")
GRAPHS = ("tests/scorecard/test_rows.py", "-k", "R15-")
GRADIENTS = ("tests/scorecard/test_rows.py", "-k", "R3-")
ROTARY = ("tests/method/test_rotary.py",)
ADAPTERS = ("tests/method/test_lora.py",)

MUTANTS = [
    Mutant(
        "source_stops_one_block_early",
        MODEL,
        "step.plan.advances_source(i)",
        "step.plan.advances_source(i + 1)",
        EXACT,
    ),
    Mutant(
        "source_runs_to_the_end",
        MODEL,
        "step.plan.advances_source(i)",
        "True",
        (*EXACT, "-k", "no_further"),
    ),
    Mutant(
        "checkpointing_does_nothing",
        MODEL,
        "checkpointing = self.target.grad_checkpointing and torch.is_grad_enabled()",
        "checkpointing = False",
        (*TRAINING, "-k", "checkpointing"),
    ),
    Mutant(
        "compile_does_nothing",
        MODEL,
        "self._target_step = CompiledPerCase(target_step, *args, **kwargs)",
        "self._target_step = target_step",
        GRAPHS,
    ),
    Mutant(
        "cases_share_their_limit",
        "stochca/compile.py",
        "self._compile(_copy(self._function))",
        "self._compile(self._function)",
        (*TRAINING, "-k", "exhausts"),
    ),
    Mutant(
        "few_tokens_ask_as_few_rows",
        ATTENTION,
        "num_queries is None and x.shape[1] < head_size(attn) and source_kv is not None",
        "False",
        GRADIENTS,
    ),
    Mutant(
        "images_are_kept",
        MODEL,
        "        self.plan = plan\n",
        '        self.plan = plan\n        self.__dict__.setdefault("kept", []).append(images)\n',
        ("tests/scorecard/test_rows.py", "-k", "R16-"),
    ),
    Mutant(
        "recipe_outlives_its_tensor",
        RECOMPUTE,
        "self._recipes.pop(key, None)",
        "None",
        (*MEMORY, "-k", "recipe_dies"),
    ),
    Mutant(
        "recipe_of_a_changed_tensor",
        RECOMPUTE,
        "recipe.version != tensor._version",
        "False",
        (*MEMORY, "-k", "was_changed"),
    ),
    Mutant(
        "recipe_without_autocast",
        RECOMPUTE,
        "torch.no_grad(), self.autocast()",
        "torch.no_grad()",
        (*MEMORY, "-k", "under_autocast"),
    ),
    Mutant(
        "recipe_computed_for_each_view",
        RECOMPUTE,
        "if self.waiting <= 0:",
        "if True:",
        (*MEMORY, "-k", "views_of_one"),
    ),
    Mutant(
        "graph_keeps_itself",
        RECOMPUTE,
        "_Versions([tensor.detach()])",
        "_Versions([tensor])",
        (*MEMORY, "-k", "nothing_in_memory"),
    ),
    Mutant(
        "pair_is_kept",
        MODEL,
        "step.recomputation.of_pair(source_kv, block.attn, y, rope)",
        "pass",
        (*MEMORY, "-k", "no_pair"),
    ),
    Mutant(
        "changed_weights_pass",
        RECOMPUTE,
        "if tensor._version != version:",
        "if False:",
        (*MEMORY, "-k", "changed_before"),
    ),
    Mutant(
        "weights_of_recipes_pass",
        RECOMPUTE,
        "_Versions([*inputs, *weights])",
        "_Versions(inputs)",
        (*MEMORY, "-k", "changed_before"),
    ),
    Mutant(
        "hooks_of_users_are_ignored",
        RECOMPUTE,
        "if not module._forward_hooks:",
        "if True:",
        (*MEMORY, "-k", "hooks_on"),
    ),
    Mutant(
        "norm_of_two_layers_is_cast",
        RECOMPUTE,
        'type(getattr(block.mlp, "fc1", None)) is nn.Linear',
        "True",
        (*MEMORY, "-k", "other_mlps"),
    ),
    Mutant(
        "scales_are_powers_of_two",
        PRECISION,
        "round_scales_to_power_of_2=False",
        "",
        (*MEMORY, "-k", "float8"),
    ),
    Mutant(
        "weights_stay_cast_back",
        MODEL,
        "self._holds_source_dtype = self.source_dtype is None",
        "pass",
        (*MEMORY, "-k", "held_again"),
    ),
    Mutant(
        "norms_are_kept", MODEL, "() if compiled else self.target.blocks", "()", (*MEMORY, "-k", "no_pair")
    ),
    Mutant(
        "weights_are_not_held",
        MODEL,
        "hold_weights(self.source, self.source_dtype)",
        "pass",
        (*MEMORY, "-k", "cast_no_more"),
    ),
    Mutant(
        "keys_in_float8", PRECISION, "and not name.endswith(_PROJECTIONS)", "", (*MEMORY, "-k", "in_float8")
    ),
    Mutant(
        "arithmetic_is_not_checked",
        PRECISION,
        "if met != wanted:",
        "if False:",
        (*MEMORY, "-k", "another_arithmetic"),
    ),
    Mutant(
        "class_rows_in_two_layouts",
        MODEL,
        "x = x[:, :rows].contiguous()",
        "x = x[:, :rows]",
        (*TRAINING, "-k", "no_order"),
    ),
    Mutant(
        "cases_share_a_name",
        "stochca/compile.py",
        'co_name=f"{function.__name__}_{next(_NUMBERS)}"',
        "",
        (*TRAINING, "-k", "no_order"),
    ),
    Mutant(
        "wrong_step_is_timed",
        "bench/step/check.py",
        "if not ratio <= allowed[name]:",
        "if False:",
        ("tests/bench_step/test_check.py",),
    ),
    Mutant(
        "stale_result_looks_fresh",
        "bench/report/recorded.py",
        'return not result.get("code") or bool(self._changed(result) or self._other_inputs(result))',
        "return False",
        ("tests/test_report.py",),
    ),
    Mutant(
        "coins_on_paper_cost_nothing",
        "bench/cost.py",
        "done[Part.CROSS if coin else Part.SELF] += 1",
        "done[Part.SELF] += 1",
        ("tests/test_cost.py",),
    ),
    Mutant(
        "fastest_rank_is_waited_for",
        "bench/scaling/waiting.py",
        "np.cumsum(chances[order]) ** count",
        "np.cumsum(chances[order])",
        ("tests/test_scaling.py",),
    ),
    Mutant(
        "source_in_train_mode", MODEL, "source.eval()", "source.train()", (*TRAINING, "-k", "only_the_target")
    ),
    Mutant(
        "source_stays_behind",
        MODEL,
        "self.source._apply(fn, recurse)",
        "pass",
        (*TRAINING, "-k", "follows_the_module"),
    ),
    Mutant("layers_without_prefix", INTERFACE, "^target\\.(?:", "(?:", (*TRAINING, "-k", "layer_decay")),
    Mutant("class_rows_too_early", PLAN, "if coin is not True", "if coin is False", EXACT),
    Mutant(
        "coins_forget_the_step",
        PLAN,
        "default_rng([self.seed, self.step, *own])",
        "default_rng([self.seed, 0, *own])",
        ("tests/method/test_plan.py",),
    ),
    Mutant(
        "coins_per_rank",
        PLAN,
        "default_rng([self.seed, self.step, *own])",
        "default_rng()",
        RANKS,
    ),
    Mutant("one_mask_for_both_branches", BLOCK, "branch * masks[1]", "branch * masks[0]", EXACT),
    Mutant(
        "residual_of_all_rows",
        BLOCK,
        "x if num_rows is None else x[:, :num_rows]\n    return",
        "x\n    return",
        EXACT,
    ),
    Mutant(
        "query_norm_forgotten",
        QKV,
        'return _finish(attn, attn.q_norm, _project(attn, "q", x), rope)',
        'return _finish(attn, nn.Identity(), _project(attn, "q", x), rope)',
        EXACT,
    ),
    Mutant(
        "key_norm_forgotten",
        QKV,
        '_finish(attn, attn.k_norm, _project(attn, "k", x), rope)',
        '_finish(attn, nn.Identity(), _project(attn, "k", x), rope)',
        (*EXACT, "-k", "variants"),
    ),
    Mutant(
        "coin_redrawn_in_checkpointing",
        MODEL,
        "checkpoint(self._target_step, self.target.blocks[i], *arguments, use_reentrant=False)",
        "checkpoint(\n"
        "                lambda block, x, kv, coin, *others: self._target_step(\n"
        "                    block, x, kv, coin and self.coins.draw(len(x), x.device).coins[i], *others\n"
        "                ),\n"
        "                self.target.blocks[i],\n"
        "                *arguments,\n"
        "                use_reentrant=False,\n"
        "            )",
        (*TRAINING, "-k", "second_coin"),
    ),
    Mutant(
        "key_norm_out_of_the_graph",
        QKV,
        "keep_in_graph(q, *(p for p in _of_key_value_alone(attn) if p.requires_grad))",
        "q",
        RANKS,
    ),
    Mutant(
        "adapters_of_the_source",
        LORA,
        "return module.get_base_layer()\n    # What",
        "return module\n    # What",
        ADAPTERS,
    ),
    Mutant("adapters_are_forgotten", LORA, "out = out + (change * scaling).to(out.dtype)", "pass", ADAPTERS),
    Mutant("adapters_are_not_scaled", LORA, "(change * scaling)", "change", ADAPTERS),
    Mutant(
        "class_rows_forget_adapters",
        LORA,
        "weight = weight + (b.weight[rows] @ a.weight * scaling).to(weight.dtype)",
        "pass",
        ADAPTERS,
    ),
    Mutant("a_second_copy", LORA, "if not p.requires_grad}", "if False}", ADAPTERS),
    Mutant(
        "saved_without_what_adapters_learned",
        LORA,
        "scale * (b.double() @ a.double())",
        "0 * (b.double() @ a.double())",
        ("tests/train/test_lora.py",),
    ),
    Mutant(
        "keys_are_not_rotated",
        QKV,
        'attn.k_norm, _project(attn, "k", x), rope)',
        'attn.k_norm, _project(attn, "k", x), None)',
        ROTARY,
    ),
    Mutant(
        "halves_for_pairs", QKV, 'if getattr(attn, "rotate_half", False) else {}', "if False else {}", ROTARY
    ),
    Mutant(
        "prefix_tokens_are_rotated",
        QKV,
        "tensor_split([attn.num_prefix_tokens], dim=2)",
        "tensor_split([0], dim=2)",
        ROTARY,
    ),
    Mutant(
        "learned_rotation_out_of_the_graph", QKV, "*([rope] if rope.requires_grad else [])", "*[]", ROTARY
    ),
    Mutant(
        "heads_shared_in_turns",
        QKV,
        "x.repeat_interleave(groups, dim=1)",
        "x.repeat(1, groups, 1, 1)",
        ROTARY,
    ),
    Mutant(
        "rotation_of_the_first_block_for_all",
        VIT,
        "list(rope)[:depth] if is_mixed and rope is not None",
        "[rope[0]] * depth if is_mixed and rope is not None",
        ROTARY,
    ),
    Mutant("source_rotated_as_the_target", MODEL, "if moves_positions(self.target):", "if True:", ROTARY),
    Mutant(
        "source_stays_where_the_target_moves", MODEL, "if moves_positions(self.target):", "if False:", ROTARY
    ),
    Mutant(
        "source_sees_the_targets_size",
        MODEL,
        "if size is None or size == tuple(images.shape[-2:]):",
        "if True:",
        ("tests/method/test_sources.py",),
    ),
    Mutant(
        "gate_forgotten",
        ATTENTION,
        "out = out * gate(x).sigmoid()",
        "pass",
        ("tests/method/test_attention.py",),
    ),
    Mutant(
        "renormalised_backwards", VIT, "(m - m0) / s0", "(m0 - m) / s0", (*TRAINING, "-k", "renormalisation")
    ),
]
