//! Which tests stand for which rows of docs/protocol.md.

use stillpoint_tests::{Registry, pages};

/// The first cells of a row, the fault by what it begins with, and its tests:
/// PROGRAM::MODULE::NAME.
type Row = (&'static str, &'static str, &'static [&'static str]);

/// The program of the quick tests, beside a scripted QEMU.
const SCRIPTED: &str = "scripted::";

const CHECKPOINT: &[Row] = &[
    ("prepare", "store unreachable", &["scripted::prepare::store_that_fails_takes_nothing"]),
    (
        "prepare",
        "the store has lost",
        &["scripted::prepare::next_builds_on_what_the_store_has_left"],
    ),
    (
        "prepare",
        "another store is in the place",
        &["scripted::prepare::another_store_in_the_place_of_the_first_is_refused_until_full"],
    ),
    (
        "upload",
        "the store loses the parent",
        &["scripted::upload::parent_lost_meanwhile_fails_before_the_commit"],
    ),
    (
        "prepare",
        "another writer holds",
        &["scripted::prepare::another_writer_is_refused_and_a_take_over_fences_the_first"],
    ),
    ("prepare", "device or RAM", &["scripted::prepare::device_that_was_plugged_in_is_named"]),
    (
        "prepare",
        "helper killed, or store lost, while a layer",
        &["scripted::prepare::layer_whose_upload_was_cut_is_stored_by_the_next"],
    ),
    ("prepare", "the store's HDFS directory", &["hdfs::erasure_coded_directories_are_refused"]),
    (
        "prepare",
        "the run state holds no guest",
        &["scripted::prepare::run_state_without_a_guest_is_refused_by_its_name"],
    ),
    (
        "between prepare and commit",
        "a device, vCPU",
        &[
            "scripted::between::device_that_comes_or_goes_meanwhile_is_named",
            "scripted::between::disk_that_changes_its_size_meanwhile_is_named",
        ],
    ),
    (
        "pre-copy, pause, stream",
        "another monitor sends",
        &[
            "scripted::pause::cont_and_stop_of_another_monitor_stay",
            "scripted::pause::reset_of_another_monitor_stays_and_the_guest_runs",
            "scripted::pause::migration_of_another_monitor_in_the_pause_stays",
        ],
    ),
    ("pre-copy, pause", "the pause lasts 2 s", &["scripted::pause::pause_ends_after_two_seconds"]),
    (
        "prepare",
        "no room for fleecing overlays",
        &["scripted::prepare::overlays_without_a_directory_leave_the_disks_alone"],
    ),
    (
        "prepare",
        "another tool's NBD server",
        &["scripted::prepare::nbd_server_of_another_tool_is_left_alone"],
    ),
    ("any", "helper killed", &["scripted::kills::helper_killed_anywhere_is_replaced_by_the_next"]),
    (
        "pre-copy, pause",
        "QMP error or timeout",
        &[
            "scripted::pause::refused_command_resumes_the_guest",
            "scripted::pause::command_without_an_answer_resumes_the_guest",
            "scripted::pause::lost_answer_to_the_transaction_loses_no_change",
        ],
    ),
    (
        "pre-copy",
        "the guest writes faster than passes",
        &["vms::promises::hostile_guest_that_dirties_memory_loses_its_checkpoint_and_no_time"],
    ),
    (
        "pre-copy, pause, stream",
        "a disk cannot be flushed",
        &["scripted::pause::flush_that_fails_comes_before_the_pause"],
    ),
    (
        "between",
        "a disk is shortened",
        &["scripted::between::disk_that_was_shorter_is_compared_as_a_whole"],
    ),
    ("between", "a disk grows", &["scripted::between::disk_that_grew_counts_as_changed_there"]),
    (
        "pause",
        "device state cannot be saved",
        &["scripted::pause::device_state_that_cannot_be_saved_is_qemus_own_error"],
    ),
    (
        "pause",
        "helper killed between",
        &["scripted::kills::guest_of_a_helper_killed_in_the_pause_waits_for_the_next"],
    ),
    (
        "stream",
        "another client is migrating",
        &["scripted::prepare::migration_of_another_client_is_not_disturbed"],
    ),
    (
        "stream",
        "the guest writes faster than the stream",
        &["scripted::stream::guest_that_writes_too_fast_is_never_stopped"],
    ),
    (
        "stream",
        "the stream is cut",
        &["scripted::stream::damaged_stream_is_cancelled_and_the_byte_is_named"],
    ),
    (
        "stream",
        "helper killed while the guest runs",
        &["scripted::kills::stream_of_a_killed_helper_fails_by_itself"],
    ),
    (
        "stream",
        "helper killed in the pause",
        &["scripted::kills::guest_of_a_helper_killed_in_the_pause_of_a_stream_waits_for_the_next"],
    ),
    (
        "stream",
        "the owner cancels",
        &["scripted::stream::migration_that_its_owner_cancels_fails_and_the_guest_runs"],
    ),
    (
        "upload",
        "directory of the fleecing overlays full",
        &["scripted::upload::copy_that_breaks_fails_the_checkpoint_and_not_the_guest"],
    ),
    (
        "upload",
        "write-back of a fleecing overlay",
        &["harmless::capture_overlay_whose_write_back_failed_breaks_it"],
    ),
    (
        "upload",
        "that directory hangs",
        &["harmless::capture_overlay_directory_that_hangs_costs_no_write"],
    ),
    (
        "upload",
        "another tool adds an export",
        &["scripted::upload::export_of_another_tool_stays_and_the_server_with_it"],
    ),
    (
        "upload",
        "DataNode dies",
        &["scripted::upload::dead_data_node_leaves_fewer_replicas_and_a_note"],
    ),
    (
        "upload",
        "NameNode or DataNode stops answering",
        &["scripted::upload::store_that_stops_answering_fails_the_checkpoint"],
    ),
    (
        "any before the rename",
        "anything but a killed helper",
        &["scripted::upload::packs_of_a_failed_try_count_for_the_next"],
    ),
    (
        "prepare",
        "packs of an earlier try are missing",
        &["scripted::upload::packs_of_a_failed_try_that_are_missing_or_cut_are_stored_again"],
    ),
    (
        "prepare",
        "another writer has claimed",
        &["scripted::upload::packs_of_a_failed_try_are_gone_when_another_has_claimed"],
    ),
    (
        "upload",
        "fenced by a newer writer",
        &["scripted::upload::fenced_writer_stores_nothing_and_its_guest_runs"],
    ),
    (
        "commit",
        "the answer to the rename is lost",
        &[
            "scripted::commit::rename_whose_answer_is_lost_is_looked_up",
            "scripted::commit::commit_that_cannot_be_determined_is_looked_up_again",
        ],
    ),
    (
        "commit",
        "helper killed before the rename",
        &["scripted::kills::helper_killed_before_the_rename_leaves_what_the_next_removes"],
    ),
    (
        "acknowledge",
        "helper killed after the rename",
        &["scripted::kills::checkpoint_of_a_helper_killed_after_the_rename_exists"],
    ),
    (
        "acknowledge",
        "old bitmap cannot be dropped",
        &["scripted::commit::bitmap_that_cannot_be_dropped_is_no_failure"],
    ),
    (
        "between",
        "QEMU ends or is killed",
        &["scripted::between::qemu_that_ends_releases_the_epoch"],
    ),
    ("between", "QEMU and helper killed", &["vms::copies::killed_restore_can_be_repeated"]),
];

/// Without phases.
const RESTORE: &[Row] = &[
    (
        "",
        "damaged or missing pack",
        &[
            "scripted::restore::damaged_or_missing_file_is_named_and_nothing_runs",
            "vms::damage::damage_is_found_and_named",
        ],
    ),
    (
        "",
        "QEMU lacks the machine type",
        &[
            "scripted::restore::machine_type_that_qemu_lacks_is_refused_before_anything_is_made",
            "engine::restore::program::test::older_qemu_is_found_by_major_and_minor_version",
        ],
    ),
    (
        "",
        "disks exist",
        &[
            "scripted::restore::disk_that_exists_is_not_overwritten",
            "engine::restore::undo::test::restore_touches_nothing_that_exists",
        ],
    ),
    (
        "",
        "device state refused",
        &[
            "scripted::restore::state_that_qemu_refuses_is_qemus_own_error",
            "vms::changes::a_restore_ends_soon_when_qemu_does_and_quotes_it",
        ],
    ),
    (
        "",
        "a port, display or tap",
        &[
            "scripted::restore::port_in_use_is_refused_with_the_map_that_helps",
            "vms::copies::copy_tap_in_use_is_named_with_a_map_that_helps",
        ],
    ),
    (
        "",
        "another checkpoint was committed",
        &[
            "scripted::restore::checkpoint_that_was_committed_meanwhile_undoes_the_restore",
            "vms::copies::failed_restore_leaves_everything_as_it_was",
        ],
    ),
    (
        "",
        "SIGINT, SIGTERM",
        &[
            "scripted::restore::interrupted_restore_undoes_everything",
            "vms::copies::failed_restore_leaves_everything_as_it_was",
        ],
    ),
    (
        "",
        "the command killed before",
        &[
            "scripted::restore::command_killed_before_cont_leaves_nothing",
            "vms::copies::failed_restore_leaves_everything_as_it_was",
        ],
    ),
    (
        "",
        "that process killed before",
        &[
            "scripted::restore::process_killed_before_cont_is_undone_by_the_same_command",
            "vms::copies::killed_restore_can_be_repeated",
        ],
    ),
    (
        "",
        "`--hook-before`",
        &[
            "scripted::hooks::hook_before_that_fails_refuses_the_restore",
            "vms::copies::hooks_of_a_restore_are_run_around_it",
        ],
    ),
    (
        "",
        "`--hook-after`",
        &[
            "scripted::hooks::hook_after_that_fails_is_a_note_and_the_vm_stays",
            "vms::copies::hooks_of_a_restore_are_run_around_it",
        ],
    ),
    (
        "",
        "the guest agent",
        &[
            "scripted::hooks::clock_that_the_agent_cannot_set_is_a_note",
            "qmp_bridge::guest_agent::test::agent_that_does_not_answer_is_not_waited_for",
        ],
    ),
    (
        "",
        "one of several copies",
        &[
            "scripted::restore::disk_that_exists_is_not_overwritten",
            "vms::copies::copies_of_one_checkpoint_are_made_by_one_command",
        ],
    ),
    (
        "",
        "the command killed after",
        &[
            "scripted::restore::command_killed_after_cont_leaves_a_vm_with_its_helper",
            "vms::copies::command_killed_once_the_guest_runs_leaves_it_a_helper",
        ],
    ),
    (
        "",
        "that process killed after",
        &[
            "scripted::restore::process_killed_after_cont_leaves_a_vm_to_attach_to",
            "vms::copies::killed_restore_can_be_repeated",
        ],
    ),
];

/// Without phases.
const LAZY: &[Row] = &[
    ("", "the store does not answer", LAZY_EXACT),
    ("", "the same for longer", &["vms::hydration::hydration_deadline_stops_the_guest_until_cont"]),
    (
        "",
        "a checkpoint in use",
        &[
            "readers_protect_what_they_read_and_all_before_it",
            "vms::hydration::hydration_protects_its_checkpoint_until_all_is_here",
        ],
    ),
    (
        "",
        "helper killed while memory",
        &[
            LAZY_EXACT[0],
            "vms::hydration::supervisor_replaces_a_killed_helper_and_the_guest_continues",
        ],
    ),
    (
        "",
        "helper killed before it reads the first fault",
        &["vms::hydration::hydration_is_exact_whatever_the_helper_was_doing_when_it_died"],
    ),
    (
        "",
        "helper killed when all memory",
        &[
            "vms::lazy::lazy_helper_killed_when_all_has_arrived_leaves_nothing_to_do",
            "vms::hydration::hydration_is_exact_whatever_the_helper_was_doing_when_it_died",
        ],
    ),
    (
        "",
        "QEMU and helper killed",
        &["vms::hydration::hydration_that_ends_with_its_host_leaves_the_checkpoint_as_it_was"],
    ),
    (
        "",
        "a frame is damaged",
        &["vms::lazy::lazy_guest_that_needs_a_damaged_page_is_stopped_until_the_store_is_repaired"],
    ),
    ("", "a frame is damaged", &["vms::hydration::hydration_damaged_frame_holds_up_no_other_page"]),
    ("", "an incremental checkpoint while memory", LAZY_EXACT),
    (
        "",
        "a checkpoint that needs all memory",
        &["vms::lazy::lazy_copy_has_the_same_bytes_and_no_checkpoint_before_all_are_here"],
    ),
    (
        "",
        "the working set",
        &["vms::working_set::lazy_restore_brings_first_what_the_guest_needed_first_the_last_time"],
    ),
    ("", "QEMU ends", &["vms::lazy::lazy_restored_qemu_may_end_before_its_memory_has_arrived"]),
    ("", "a block cannot be read", LAZY_BLOCKS),
    ("", "a block is damaged", &[LAZY_BLOCKS[0]]),
    ("", "the guest shuts down", &["vms::lazy::lazy_guest_that_shuts_down_leaves_complete_disks"]),
    ("", "helper killed while disks", LAZY_DISKS),
    (
        "",
        "helper killed when all disks",
        &["vms::lazy::lazy_helper_killed_when_all_has_arrived_leaves_nothing_to_do"],
    ),
    ("", "an incremental checkpoint while disks", LAZY_DISKS),
    (
        "",
        "a checkpoint that needs all of a disk",
        &["vms::lazy::lazy_copy_has_the_same_bytes_and_no_checkpoint_before_all_are_here"],
    ),
    ("", "a balloon", &["vms::lazy::lazy_is_not_possible_with_a_balloon_and_says_so"]),
];
const LAZY_BLOCKS: &[&str] = &[
    "vms::lazy::lazy_guest_that_needs_a_block_is_stopped_until_it_can_be_read",
    "scripted::disk_export::exported_disk_is_the_whole_and_waits_for_a_store_that_is_away",
];
const LAZY_DISKS: &[&str] =
    &["vms::lazy::lazy_disks_are_exact_through_checkpoints_and_a_kill_and_then_depend_on_nothing"];
const LAZY_EXACT: &[&str] = &[
    "vms::lazy::lazy_restored_guest_is_exact_through_checkpoints_a_kill_and_a_store_that_is_away",
];

const ADOPTION: &[Row] = &[
    (
        "plan",
        "anything that cannot be moved",
        &[
            "scripted::adoption::vm_that_cannot_be_moved_is_refused_and_nothing_is_done",
            "vms::attach::an_engine_that_cannot_be_had_is_refused_at_once",
        ],
    ),
    (
        "start",
        "the new QEMU does not come up",
        &[
            "scripted::adoption::new_qemu_that_does_not_come_up_or_is_another_vm_is_ended",
            "vms::adopt::a_destination_that_dies_leaves_the_source_running",
        ],
    ),
    (
        "moving",
        "new QEMU ends",
        &[
            "scripted::adoption::new_qemu_that_ends_or_refuses_the_state_undoes_the_move",
            "vms::adopt::a_destination_that_dies_leaves_the_source_running",
        ],
    ),
    (
        "moving",
        "the guest writes too fast",
        &[
            "scripted::adoption::guest_that_writes_too_fast_stays_where_it_is",
            "migration::local::test::a_move_under_way_is_cancelled_and_the_guest_awaited",
        ],
    ),
    (
        "moving",
        "old QEMU ends",
        &[
            "scripted::adoption::old_qemu_that_ends_while_it_moves_is_the_vms_end",
            "vms::adopt::a_source_that_dies_leaves_one_vm_or_none",
        ],
    ),
    (
        "any before `decided`",
        "helper killed",
        &[
            "scripted::adoption::helper_killed_before_the_decision_is_undone_by_the_next",
            "vms::adopt::one_vm_continues_wherever_the_helper_dies",
        ],
    ),
    (
        "switched, completed",
        "new QEMU killed",
        &[
            "scripted::adoption::new_qemu_killed_before_its_guest_runs_undoes_the_move",
            "vms::adopt::a_destination_that_dies_leaves_the_source_running",
        ],
    ),
    (
        "decided, resuming",
        "new QEMU killed before",
        &[
            "scripted::adoption::new_qemu_killed_before_its_cont_undoes_the_move",
            "vms::adopt::a_destination_that_dies_leaves_the_source_running",
        ],
    ),
    (
        "resuming",
        "new QEMU killed after",
        &[
            "scripted::adoption::new_qemu_killed_after_it_wrote_a_disk_is_the_vms_end",
            "vms::adopt::a_destination_that_dies_leaves_the_source_running",
        ],
    ),
    (
        "resuming",
        "`cont` refused",
        &[
            "scripted::adoption::cont_that_the_new_qemu_refuses_undoes_the_move",
            "qmp_bridge::migration::local::test::cont_resumes_the_source_of_a_completed_move",
        ],
    ),
    (
        "decided, resuming",
        "helper killed",
        &[
            "scripted::adoption::helper_killed_after_the_decision_is_finished_by_the_next",
            "vms::adopt::one_vm_continues_wherever_the_helper_dies",
        ],
    ),
    (
        "from `decided`",
        "old QEMU killed",
        &[
            "scripted::adoption::old_qemu_killed_after_the_decision_costs_nothing",
            "vms::adopt::a_source_that_dies_leaves_one_vm_or_none",
        ],
    ),
    (
        "running, finishing",
        "helper killed",
        &[
            "scripted::adoption::helper_killed_after_the_decision_is_finished_by_the_next",
            "vms::adopt::one_vm_continues_wherever_the_helper_dies",
        ],
    ),
    (
        "running",
        "new QEMU killed",
        &[
            "scripted::adoption::new_qemu_killed_once_it_is_the_vm_is_the_vms_end",
            "vms::window::window_in_which_qemu_is_killed_names_that",
        ],
    ),
    (
        "finishing",
        "a socket or port",
        &[
            "scripted::adoption::socket_that_cannot_be_taken_over_is_noted",
            "vms::adopt::one_vm_continues_wherever_the_helper_dies",
        ],
    ),
];

const ROLLBACK: &[Row] = &[
    (
        "",
        "external VM, another lineage",
        &[
            "vms::rollback::rollback_is_refused_before_anything_is_touched",
            "vms::rollback::rollback_of_an_external_vm_is_refused",
        ],
    ),
    ("", "the store fails", &["vms::rollback::rollback_that_fails_early_leaves_the_guest_running"]),
    (
        "",
        "helper killed before `rollback.json`",
        &["vms::rollback::rollback_helper_may_die_at_every_point"],
    ),
    ("", "helper killed after that", &["vms::rollback::rollback_helper_may_die_at_every_point"]),
    (
        "",
        "QEMU does not load",
        &["vms::rollback::rollback_that_fails_late_leaves_the_guest_stopped"],
    ),
    (
        "",
        "another client sends `cont`",
        &[
            "qmp_bridge::paused::test::held_pause_is_not_resumed_and_fails_if_it_was_disturbed",
            "vms::rollback::rollback_that_another_monitor_disturbs_leaves_the_guest_stopped",
        ],
    ),
];

/// Each row has its tests, and each entry its row.
fn wrong_with(heading: &str, entries: &[Row], tests: &Registry) -> Vec<String> {
    let rows = pages::rows("protocol.md", heading);
    assert!(rows.len() > 5, "{heading}: {rows:?}");
    let is = |row: &[String], (phase, fault, _): &Row| match *phase {
        "" => row[0].starts_with(fault),
        phase => row[0] == phase && row[1].starts_with(fault),
    };
    let mut wrong = Vec::new();
    for row in &rows {
        if !entries.iter().any(|entry| is(row, entry)) {
            wrong.push(format!("{heading}: no test in tests/tests/rows.rs for the row {row:?}"));
        }
    }
    for entry in entries {
        let (phase, fault, names) = entry;
        let found = rows.iter().filter(|row| is(row, entry)).count();
        if found != 1 || names.is_empty() {
            wrong.push(format!("{heading}: {found} rows for ({phase}, {fault}), tests {names:?}"));
        }
        let missing = names.iter().filter(|name| !tests.has(name));
        wrong.extend(missing.map(|name| format!("{heading}: ({phase}, {fault}): no test {name}")));
    }
    wrong
}

fn is_quick(name: &&&str) -> bool {
    name.starts_with(SCRIPTED)
}

#[test]
fn rows_of_the_protocol_have_tests() {
    let tests = Registry::get();
    let tables = [
        ("Phase x fault -> outcome", CHECKPOINT),
        ("Restore", RESTORE),
        ("Lazy restore", LAZY),
        ("Adoption", ADOPTION),
        ("Rollback", ROLLBACK),
    ];
    let wrong = tables.iter().flat_map(|(heading, rows)| wrong_with(heading, rows, tests));
    let mut wrong: Vec<String> = wrong.collect();
    for (phase, fault, names) in RESTORE.iter().chain(ADOPTION) {
        let quick = names.iter().filter(is_quick).count();
        if quick == 0 || quick == names.len() {
            wrong.push(format!("({phase}, {fault}) needs a scripted test and a real one"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let quick = CHECKPOINT.iter().flat_map(|(.., names)| *names).filter(is_quick);
    assert!(quick.count() > 40);
}
