//! Which test stands for which row of docs/protocol.md.

use std::path::Path;

use crate::{between, commit, kills, pause, prepare, stream, upload};

/// The quick test of a row, or the one with real parts that stands for it alone.
enum Test {
    Scripted(#[expect(dead_code, reason = "that it is there is the point")] fn()),
    /// Of `tests/tests/`, of another crate, or of a module: its name.
    Real(&'static str),
}
use Test::{Real, Scripted};

/// By the first cells of a row; the fault by what it begins with.
const CHECKPOINT: &[(&str, &str, Test)] = &[
    ("prepare", "store unreachable", Scripted(prepare::store_that_fails_takes_nothing)),
    ("prepare", "the store has lost", Scripted(prepare::next_builds_on_what_the_store_has_left)),
    (
        "prepare",
        "another store is in the place",
        Scripted(prepare::another_store_in_the_place_of_the_first_is_refused_until_full),
    ),
    (
        "upload",
        "the store loses the parent",
        Scripted(upload::parent_lost_meanwhile_fails_before_the_commit),
    ),
    (
        "prepare",
        "another writer holds",
        Scripted(prepare::another_writer_is_refused_and_a_take_over_fences_the_first),
    ),
    ("prepare", "device or RAM", Scripted(prepare::device_that_was_plugged_in_is_named)),
    (
        "prepare",
        "helper killed, or store lost, while a layer",
        Scripted(prepare::layer_whose_upload_was_cut_is_stored_by_the_next),
    ),
    ("prepare", "the store's HDFS directory", Real("erasure_coded_directories_are_refused")),
    (
        "prepare",
        "the run state holds no guest",
        Scripted(prepare::run_state_without_a_guest_is_refused_by_its_name),
    ),
    (
        "between prepare and commit",
        "a device, vCPU",
        Scripted(between::device_that_comes_or_goes_meanwhile_is_named),
    ),
    (
        "between prepare and commit",
        "a device, vCPU",
        Scripted(between::disk_that_changes_its_size_meanwhile_is_named),
    ),
    (
        "pre-copy, pause, stream",
        "another monitor sends",
        Scripted(pause::cont_and_stop_of_another_monitor_stay),
    ),
    (
        "pre-copy, pause, stream",
        "another monitor sends",
        Scripted(pause::reset_of_another_monitor_stays_and_the_guest_runs),
    ),
    (
        "pre-copy, pause, stream",
        "another monitor sends",
        Scripted(pause::migration_of_another_monitor_in_the_pause_stays),
    ),
    ("pre-copy, pause", "the pause lasts 2 s", Scripted(pause::pause_ends_after_two_seconds)),
    (
        "prepare",
        "no room for fleecing overlays",
        Scripted(prepare::overlays_without_a_directory_leave_the_disks_alone),
    ),
    (
        "prepare",
        "another tool's NBD server",
        Scripted(prepare::nbd_server_of_another_tool_is_left_alone),
    ),
    ("any", "helper killed", Scripted(kills::helper_killed_anywhere_is_replaced_by_the_next)),
    ("pre-copy, pause", "QMP error or timeout", Scripted(pause::refused_command_resumes_the_guest)),
    (
        "pre-copy, pause",
        "QMP error or timeout",
        Scripted(pause::command_without_an_answer_resumes_the_guest),
    ),
    (
        "pre-copy, pause",
        "QMP error or timeout",
        Scripted(pause::lost_answer_to_the_transaction_loses_no_change),
    ),
    (
        "pre-copy",
        "the guest writes faster than passes",
        Real("hostile_guest_that_dirties_memory_loses_its_checkpoint_and_no_time"),
    ),
    (
        "pre-copy, pause, stream",
        "a disk cannot be flushed",
        Scripted(pause::flush_that_fails_comes_before_the_pause),
    ),
    (
        "between",
        "a disk is shortened",
        Scripted(between::disk_that_was_shorter_is_compared_as_a_whole),
    ),
    ("between", "a disk grows", Scripted(between::disk_that_grew_counts_as_changed_there)),
    (
        "pause",
        "device state cannot be saved",
        Scripted(pause::device_state_that_cannot_be_saved_is_qemus_own_error),
    ),
    (
        "pause",
        "helper killed between",
        Scripted(kills::guest_of_a_helper_killed_in_the_pause_waits_for_the_next),
    ),
    (
        "stream",
        "another client is migrating",
        Scripted(prepare::migration_of_another_client_is_not_disturbed),
    ),
    (
        "stream",
        "the guest writes faster than the stream",
        Scripted(stream::guest_that_writes_too_fast_is_never_stopped),
    ),
    (
        "stream",
        "the stream is cut",
        Scripted(stream::damaged_stream_is_cancelled_and_the_byte_is_named),
    ),
    (
        "stream",
        "helper killed while the guest runs",
        Scripted(kills::stream_of_a_killed_helper_fails_by_itself),
    ),
    (
        "stream",
        "helper killed in the pause",
        Scripted(kills::guest_of_a_helper_killed_in_the_pause_of_a_stream_waits_for_the_next),
    ),
    (
        "stream",
        "the owner cancels",
        Scripted(stream::migration_that_its_owner_cancels_fails_and_the_guest_runs),
    ),
    (
        "upload",
        "directory of the fleecing overlays full",
        Scripted(upload::copy_that_breaks_fails_the_checkpoint_and_not_the_guest),
    ),
    (
        "upload",
        "write-back of a fleecing overlay",
        Real("capture_overlay_whose_write_back_failed_breaks_it"),
    ),
    ("upload", "that directory hangs", Real("capture_overlay_directory_that_hangs_costs_no_write")),
    (
        "upload",
        "another tool adds an export",
        Scripted(upload::export_of_another_tool_stays_and_the_server_with_it),
    ),
    ("upload", "DataNode dies", Scripted(upload::dead_data_node_leaves_fewer_replicas_and_a_note)),
    (
        "upload",
        "NameNode or DataNode stops answering",
        Scripted(upload::store_that_stops_answering_fails_the_checkpoint),
    ),
    (
        "any before the rename",
        "anything but a killed helper",
        Scripted(upload::packs_of_a_failed_try_count_for_the_next),
    ),
    (
        "prepare",
        "packs of an earlier try are missing",
        Scripted(upload::packs_of_a_failed_try_that_are_missing_or_cut_are_stored_again),
    ),
    (
        "prepare",
        "another writer has claimed",
        Scripted(upload::packs_of_a_failed_try_are_gone_when_another_has_claimed),
    ),
    (
        "upload",
        "fenced by a newer writer",
        Scripted(upload::fenced_writer_stores_nothing_and_its_guest_runs),
    ),
    (
        "commit",
        "the answer to the rename is lost",
        Scripted(commit::rename_whose_answer_is_lost_is_looked_up),
    ),
    (
        "commit",
        "the answer to the rename is lost",
        Scripted(commit::commit_that_cannot_be_determined_is_not_durable_and_is_looked_up_again),
    ),
    (
        "commit",
        "helper killed before the rename",
        Scripted(kills::helper_killed_before_the_rename_leaves_what_the_next_removes),
    ),
    (
        "acknowledge",
        "helper killed after the rename",
        Scripted(kills::checkpoint_of_a_helper_killed_after_the_rename_exists),
    ),
    (
        "acknowledge",
        "old bitmap cannot be dropped",
        Scripted(commit::bitmap_that_cannot_be_dropped_is_no_failure),
    ),
    ("between", "QEMU ends or is killed", Scripted(between::qemu_that_ends_releases_the_epoch)),
    ("between", "QEMU and helper killed", Real("killed_restore_can_be_repeated")),
];

/// By the fault.
const RESTORE: &[(&str, Test)] = &[
    ("damaged or missing pack", Real("damage_is_found_and_named")),
    ("QEMU lacks the machine type", Real("older_qemu_is_found_by_major_and_minor_version")),
    ("disks exist", Real("restore_touches_nothing_that_exists")),
    ("device state refused", Real("a_restore_ends_soon_when_qemu_does_and_quotes_it")),
    ("a port, display or tap", Real("copy_tap_in_use_is_named_with_a_map_that_helps")),
    ("another checkpoint was committed", Real("failed_restore_leaves_everything_as_it_was")),
    ("SIGINT, SIGTERM", Real("failed_restore_leaves_everything_as_it_was")),
    ("the command killed before", Real("failed_restore_leaves_everything_as_it_was")),
    ("that process killed before", Real("killed_restore_can_be_repeated")),
    ("the command killed after", Real("command_killed_once_the_guest_runs_leaves_it_a_helper")),
    ("that process killed after", Real("killed_restore_can_be_repeated")),
];

const ADOPTION: &[(&str, &str, Test)] = &[
    (
        "plan",
        "anything that cannot be moved",
        Real("an_engine_that_cannot_be_had_is_refused_at_once"),
    ),
    (
        "start",
        "the new QEMU does not come up",
        Real("a_destination_that_dies_leaves_the_source_running"),
    ),
    ("moving", "new QEMU ends", Real("a_destination_that_dies_leaves_the_source_running")),
    (
        "moving",
        "the guest writes too fast",
        Real("a_move_under_way_is_cancelled_and_the_guest_awaited"),
    ),
    ("moving", "old QEMU ends", Real("a_source_that_dies_leaves_one_vm_or_none")),
    ("any before `decided`", "helper killed", Real("one_vm_continues_wherever_the_helper_dies")),
    (
        "switched, completed",
        "new QEMU killed",
        Real("a_destination_that_dies_leaves_the_source_running"),
    ),
    (
        "decided, resuming",
        "new QEMU killed before",
        Real("a_destination_that_dies_leaves_the_source_running"),
    ),
    (
        "resuming",
        "new QEMU killed after",
        Real("a_destination_that_dies_leaves_the_source_running"),
    ),
    ("resuming", "`cont` refused", Real("cont_resumes_the_source_of_a_completed_move")),
    ("decided, resuming", "helper killed", Real("one_vm_continues_wherever_the_helper_dies")),
    ("from `decided`", "old QEMU killed", Real("a_source_that_dies_leaves_one_vm_or_none")),
    ("running, finishing", "helper killed", Real("one_vm_continues_wherever_the_helper_dies")),
    ("running", "new QEMU killed", Real("window_in_which_qemu_is_killed_names_that")),
    ("finishing", "a socket or port", Real("one_vm_continues_wherever_the_helper_dies")),
];

const PROTOCOL: &str = include_str!("../../../docs/protocol.md");

/// The cells of each row of the first table below a heading, but for its head.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let at = PROTOCOL.find(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("{heading}"));
    let lines = PROTOCOL[at..].lines().skip_while(|line| !line.starts_with('|')).skip(2);
    let rows = lines.take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split(" | ").map(str::trim).collect()).collect()
}

/// Each row has a test, and each test a row.
fn assert_covered(heading: &str, tests: &[(&str, &str, &Test)]) {
    let rows = table(heading);
    assert!(rows.len() > 5, "{heading}: {rows:?}");
    let is = |row: &[&str], phase: &str, fault: &str| match phase {
        "" => row[0].starts_with(fault),
        _ => row[0] == phase && row[1].starts_with(fault),
    };
    for row in &rows {
        let found = tests.iter().any(|(phase, fault, _)| is(row, phase, fault));
        assert!(found, "{heading}: no test in engine/tests/scripted/rows.rs for the row {row:?}");
    }
    for (phase, fault, test) in tests {
        let found = rows.iter().filter(|row| is(row, phase, fault)).count();
        assert_eq!(found, 1, "{heading}: rows for ({phase}, {fault})");
        if let Real(name) = test {
            assert!(
                is_a_test(name),
                "{heading}: ({phase}, {fault}) names {name}, which is no test"
            );
        }
    }
}

fn is_a_test(name: &str) -> bool {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let crates = ["tests/tests", "checkpoint-store/tests", "qmp-bridge", "engine/src", "vm/src"];
    crates.iter().any(|folder| has_test(&root.join(folder), &format!("fn {name}()")))
}

fn has_test(path: &Path, function: &str) -> bool {
    if path.is_dir() {
        let entries = std::fs::read_dir(path).unwrap().flatten();
        return entries.into_iter().any(|entry| has_test(&entry.path(), function));
    }
    let is_rust = path.extension().is_some_and(|extension| extension == "rs");
    is_rust && std::fs::read_to_string(path).unwrap().contains(function)
}

#[test]
fn each_row_of_the_protocol_has_a_test() {
    let with_phase = |table: &'static [(&str, &str, Test)]| {
        table.iter().map(|(phase, fault, test)| (*phase, *fault, test)).collect::<Vec<_>>()
    };
    assert_covered("Phase x fault -> outcome", &with_phase(CHECKPOINT));
    let restore: Vec<_> = RESTORE.iter().map(|(fault, test)| ("", *fault, test)).collect();
    assert_covered("Restore", &restore);
    assert_covered("Adoption", &with_phase(ADOPTION));
    let quick = |test: &Test| matches!(test, Scripted(_));
    assert!(CHECKPOINT.iter().filter(|(.., test)| quick(test)).count() > 40);
}
