"""What strangers' files, settings, tools and accidents once made silently wrong: input -> right answer, and its test.

"one line" is an error that names key or file, value and mend, and leaves every file as it was. A test's path is below
``tests/``; it holds the row's input, and further ones of the same kind.
"""

import re
from pathlib import Path

import pytest

INPUTS = """
1 data.name=c4_train, my_val_set, a_val_b_train_c -> the end of a name decides
    data/test_roles.py::test_no_name_puts_validation_into_training
1 tiny_shakespeare_train.bin -> opens
    data/test_roles.py::test_llm_c_s_own_names_open
1 a shard that says neither -> one line
    data/test_roles.py::test_a_shard_without_a_role_is_named
1 a manifest beside other names -> the manifest decides
    data/test_roles.py::test_the_manifest_decides_where_there_is_one
1 X_TRAIN_000002.BIN -> read too
    data/test_roles.py::test_endings_count_in_any_case
1 validation links to training, or is its copy; a training shard twice -> one line
    data/test_roles.py::test_a_file_is_read_for_one_purpose_and_once
1 ._x_train_000001.bin, .x_train_000002.bin -> left out
    data/test_roles.py::test_hidden_files_are_no_shards
1 a FIFO or a folder called x_train_000001.bin -> one line
    data/test_roles.py::test_what_is_no_file_is_named_and_not_waited_for
1 a manifest with other words, places, types -> one line
    data/test_roles.py::test_a_manifest_that_says_something_else_is_one_line
1 data.name with a slash, NUL, line's end, 300 letters -> one line
    data/test_roles.py::test_a_name_that_names_no_files_is_one_line
1 x_train_2.bin, x_train_10.bin -> in the order of their numbers
    data/test_roles.py::test_shards_come_in_the_order_of_their_numbers
2 data.source=B where A was prepared -> one line
    data/test_origin.py::test_another_source_is_named
2 text replaced behind the first tokens -> another fingerprint
    data/test_origin.py::test_text_replaced_anywhere_changes_the_fingerprint
2 data.validation=first of a folder that is spread -> one line
    data/test_origin.py::test_another_validation_is_not_what_was_prepared
3 links to folders, circles of them -> read once
    data/test_local.py::test_linked_folders_and_files_are_read_once
3 .ipynb_checkpoints, UTF-16 .txt, latin-1, .csv -> counted
    data/test_local.py::test_what_is_not_read_is_counted
3 byte-order marks, .JSONL, .TXT, .ndjson -> read
    data/test_local.py::test_what_is_text_is_read
3 an empty .gz, an LFS pointer, a JSON array -> one line
    data/test_local.py::test_a_file_that_is_wrong_as_a_whole_is_named
3 dictionary-encoded and binary columns -> read
    data/test_local.py::test_any_column_of_characters_or_bytes_is_text
3 two columns called text -> one line
    data/test_local.py::test_two_columns_of_one_name_are_named
3 a source without any text -> its true reason
    data/test_local.py::test_the_reason_for_no_text_is_the_true_one
4 text in the order of its authors -> validation from all
    data/test_spread.py
4 seed=1 -> another order where it is shuffled
    data/test_loader.py::test_seed_decides_the_shuffle
5 cautious=no, nesterov=off, maximize=off, polar_steps=5.0 -> read as the class says
    optim/test_settings.py::test_a_value_is_read_as_the_class_says
5 weight_decay=none, foreach beside fused, betas=0.9 -> one line
    optim/test_settings.py::test_what_it_cannot_mean_is_one_line
5 _target_=os.system -> one line, not called
    optim/test_settings.py::test_what_is_no_optimizer_is_not_called
6 lr, eps, momentum, weight_decay out of range -> one line
    optim/test_settings.py::test_values_out_of_range_are_named_everywhere
6 splitt, split=0, conv1d="no" in a group -> one line
    optim/test_settings.py::test_groups_are_read_like_constructors
6 a checkpoint without a key -> its default
    optim/test_settings.py::test_an_old_checkpoint_gets_defaults_for_what_it_lacks_and_no_unknown_keys
7 parameters replaced, cast, regrouped -> one line
    optim/test_parameters.py::test_parameters_that_changed_are_named
7 removed from its group -> frozen
    optim/test_parameters.py::test_a_parameter_taken_out_of_its_group_is_frozen
7 built before to_empty -> one line
    optim/test_parameters.py::test_an_optimizer_built_before_to_empty_says_so
7 built before fully_shard -> one line
    optim/test_parameters.py::test_an_optimizer_built_before_fully_shard_says_so
7 complex, sparse gradients -> one line
    optim/test_parameters.py::test_tensors_of_another_kind
7 float8, whole numbers, shared memory -> one line at once
    optim/test_parameters.py::test_what_cannot_be_trained_is_named_at_once
7 empty matrices -> left alone
    optim/test_parameters.py::test_empty_matrices_are_left_alone
7 kernels [O, I, kh, kw] -> one matrix
    optim/test_parameters.py::test_a_kernel_is_one_matrix
7 a Hugging Face Conv1D -> seen
    optim/test_parameters.py::test_build_sees_how_a_module_stores_its_weight
7 weights tied by their data, views of a parameter -> one line
    optim/test_parameters.py::test_memory_that_two_parameters_share_is_named
7 a gradient of partial sums -> added up
    optim/test_parameters.py::test_a_gradient_of_partial_sums_is_added_up
7 a gradient of another dtype -> the parameter's
    optim/test_parameters.py::test_a_gradient_may_have_another_dtype
7 parameters of two devices -> each on its own
    optim/test_parameters.py::test_parameters_of_two_devices
8 float16 weights, gradients of 0 ... 1e4 -> finite
    optim/test_extremes.py::test_weights_in_half_precision_stay_finite
8 gradients of 1e19 and 1e-25 -> full steps
    optim/test_extremes.py::test_a_step_has_its_length_at_any_size_of_the_gradient
8 gradients of 1e-38 ... 3e38, in every rule that squares them -> finite weights and state
    optim/test_extremes.py::test_weights_and_state_stay_finite_at_any_size_of_the_gradient
8 a gradient norm that leaves float32, in the trainer -> one line
    trainer/test_guard.py::test_a_gradient_whose_squares_leave_float32_is_not_applied
8 eps=0 with a row of zeros, in every rule -> finite
    optim/test_extremes.py::test_without_eps_nothing_is_divided_by_zero
8 OneCycleLR without momentum -> works
    optim/test_extremes.py::test_a_scheduler_may_bring_momentum
8 lr as a tensor -> works in every rule
    optim/test_extremes.py::test_lr_may_be_a_tensor
8 polar_express_coefficients(12, 1e-4, .02, .01) -> exist
    optim/test_extremes.py::test_coefficients_exist_for_every_setting
8 Shampoo's null space in float32 -> drowns nothing
    optim/test_shampoo.py::test_a_null_space_in_float32_does_not_drown_the_step
9 logger=null, seed=-1, hydra.run.dir, ${hydra:...} -> one line
    trainer/test_launch.py::test_what_strangers_type_is_told_in_one_line
9 WORLD_SIZE=abc, RANK=5 of 2, MASTER_PORT=tcp -> one line
    trainer/test_odd_starts.py::test_what_is_no_rank_is_told_before_anything_starts
9 run.name=../../x, 300 letters -> one folder in runs
    trainer/test_odd_starts.py::test_a_name_is_one_folder
9 a sweep of no job, over hydra.sweep.dir -> one line
    trainer/test_sweep.py::test_a_sweep_has_jobs_and_is_not_over_hydra_s_own_keys
9 run.init, run.from, eval.tasks of nothing -> one line, no directory taken
    trainer/test_launch.py::test_what_a_run_begins_with_is_looked_for_before_it_takes_a_directory
9 run.dir=~/x, experiment=null -> mean what they say
    trainer/test_launch.py::test_home_and_no_experiment_can_be_typed
9 x_b and x/b in a sweep -> one line
    trainer/test_sweep.py::test_jobs_of_a_sweep_cannot_share_a_directory
9 RANK=0 WORLD_SIZE=1 left over -> one process
    trainer/test_launch.py::test_a_rank_left_in_the_environment_is_one_process
9 ACCELERATE_USE_DEEPSPEED, ACCELERATE_USE_MEGATRON_LM of a user's file -> left out
    distributed/test_processes.py::test_what_a_user_s_accelerate_file_asks_for_is_left_out
9 MASTER_PORT taken -> one line at once
    trainer/test_launch.py::test_a_port_that_another_program_holds_is_told_at_once
9 the launcher killed while its workers start -> they end, one line
    distributed/test_kill.py::test_a_launcher_that_goes_at_once_takes_its_workers_along
9 -m under latin-1 -> shown
    trainer/test_sweep.py::test_a_terminal_without_unicode_shows_the_summary
9 optim=track3/adam on another model -> told, or one line
    trainer/test_track3.py::test_a_record_s_schedule_is_not_lost_and_does_not_win_unsaid
10 eval.tokens changed on resume -> a header of its own
    trainer/test_unfinished.py::test_every_start_says_what_its_lines_were_measured_under
10 other model, data, precision, in one table -> set aside
    scripts/test_compare_groups.py::test_what_differs_is_set_aside_not_mixed
10 a model class with one setting more -> the same model
    scripts/test_compare_groups.py::test_a_model_is_the_same_where_its_class_has_more_settings_now
10 a resume after such a change -> the same run
    scripts/test_compare_groups.py::test_a_run_goes_on_where_its_model_has_more_settings_now
11 a record without its checkpoints -> stops, keeps it
    trainer/test_unfinished.py::test_a_record_without_a_checkpoint_is_not_begun_anew
11 another run's metrics.jsonl beside the checkpoints -> one line
    trainer/test_unfinished.py::test_the_record_of_another_run_is_not_gone_on_with
11 a last checkpoint still being written at the end -> waited for
    trainer/test_unfinished.py::test_a_checkpoint_on_its_way_at_the_end_is_waited_for
11 run.dir renamed during a run -> fails loudly
    trainer/test_unfinished.py::test_a_directory_that_is_renamed_is_not_made_again
11 two first starts -> one of them
    trainer/test_unfinished.py::test_two_first_starts_of_one_directory
11 EIO, ESTALE, EMFILE, permission -> not renamed
    trainer/test_unfinished.py::test_a_checkpoint_that_cannot_be_read_now_is_not_damaged
11 a full disk without checkpoints -> exit code 1
    trainer/test_unfinished.py::test_lines_that_are_lost_at_the_end_are_an_error
11 run.from in a copy of the trunk's directory -> one line
    trainer/test_branch.py::test_a_copied_directory_has_not_gone_on_from_the_original
12 one flipped bit in a replica -> rank and tensor named
    distributed/test_kill.py::test_a_replica_that_differs_is_named
12 one flipped bit in Adam's or a matrix rule's state, in the average of weights, under HSDP -> rank and tensor named
    distributed/test_kill.py::test_a_replica_that_differs_is_named
12 any bit, any exchange of places -> seen
    trainer/test_guard.py::test_no_bit_and_no_exchange_of_places_is_missed
13 17 groups of long labels -> drawn
    scripts/test_compare_odd.py::test_many_groups_with_long_labels_are_drawn
13 cells that begin with = -> text
    scripts/test_compare_odd.py::test_a_spreadsheet_computes_no_cell
13 no target -> nothing of speed
    scripts/test_compare_odd.py::test_without_a_target_nothing_is_said_of_speed
13 deep lines, a step of 10^400, a string step -> named, that run alone
    scripts/test_compare_records.py::test_faults_flag_the_run_and_set_it_aside
13 a byte-order mark, U+2028 -> read
    scripts/test_compare_records.py::test_marks_cost_nothing
13 labels that are no text, or half a character -> all outputs
    scripts/test_compare_odd.py::test_any_label_is_on_all_four_outputs
13 losses of 1e308, a target "3" -> set aside
    scripts/test_compare_odd.py::test_numbers_that_are_none_are_set_aside
14 a byte-level model, its tokenizer -> the same text
    scripts/test_export.py::test_transformers_reads_it_and_writes_the_same_text
14 prefixes _orig_mod. and module., nanoGPT's Linear layout -> the same logits
    trainer/test_initial.py::test_logits_are_theirs_and_training_goes_on
14 weights of another number of layers, an untied head -> one line
    trainer/test_weights.py::test_foreign_weights_are_refused
15 W&B out of reach -> offline at once
    trainer/test_wandb.py::test_wandb_out_of_reach_is_offline_at_once
15 a key, a project, a run's id that are refused, WANDB_MODE=online without a key -> offline
    trainer/test_wandb.py::test_what_wandb_refuses_keeps_the_run_offline
15 WANDB_MODE="" or hello, a key with a line's end -> offline, read
    trainer/test_wandb.py::test_wandb_is_offline_without_a_key
16 a hostile index -> nothing is unpickled
    trainer/test_dcp_index.py::test_nothing_is_unpickled
16 chunks that overlap, or lie outside of their tensor -> one line, not what was in memory
    trainer/test_dcp_index.py::test_an_index_that_is_none_is_one_line
16 a FIFO, a NUL, a deep nest in a manifest -> one line
    trainer/test_dcp_index.py::test_a_manifest_that_names_what_is_no_file_of_the_folder
16 a state without a key, or of another step -> one line
    trainer/test_dcp_index.py::test_a_state_that_lacks_something_is_one_line
17 full_state_dict, broadcast_from_rank0 -> the same run
    distributed/test_state_dict.py::test_full_state_dicts_broadcast_from_rank_0
17 DDP's rank 0 saves -> consolidated, or one line
    distributed/test_state_dict.py::test_ddp_consolidates_and_loads_on_any_number_of_ranks
17 a state of another rule -> refused at load
    optim/test_state_dict.py::test_the_state_of_another_rule_is_refused_at_load
17 Signum's state in Muon or Dion2, UncorrectedAdam's in AdamH -> refused at load
    optim/test_state_dict.py::test_the_state_of_another_rule_is_refused_at_load
17 any rule's state in any other, torch's in Combined too -> one line that names both
    optim/test_state_dict.py::test_no_rule_takes_the_state_of_any_other
17 step=-3, a group without settings -> one line at load
    optim/test_state_dict.py::test_counters_and_settings_that_a_state_dict_cannot_have
17 state of whole or complex numbers -> one line at load
    optim/test_state_dict.py::test_damaged_state_is_refused_at_load
17 load hooks -> see and change it
    optim/test_state_dict.py::test_hooks_see_and_change_the_owners_state
"""
TESTS = re.findall(r"^    (\S+)$", INPUTS, re.MULTILINE)


@pytest.mark.parametrize("test", TESTS)
def test_the_test_of_a_row_exists(test):
    file, _, name = test.partition("::")
    assert re.search(rf"^def {name or 'test_'}", (Path(__file__).parent / file).read_text(), re.MULTILINE)


def test_every_kind_has_rows():
    kinds = re.findall(r"^(\d+) .* -> ", INPUTS, re.MULTILINE)
    assert {*map(int, kinds)} == {*range(1, 18)} and len(kinds) == len(TESTS)
