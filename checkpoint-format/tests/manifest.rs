//! What a manifest must fulfil, one rule at a time.

mod common;

use checkpoint_format::*;
use common::*;

type Change = fn(&mut Manifest);

/// Refused alike when it is written and, behind a right digest, when it is read.
fn assert_refused(change: Change, words: &str) {
    let mut bad = sample_manifest();
    change(&mut bad);
    let written = bad.encode().expect_err(words);
    assert!(written.to_string().contains(words), "{written}");
    let body = serde_json::to_vec(&bad).expect("JSON");
    let read = Manifest::parse(&envelope("stillpoint-manifest", &body)).expect_err(words);
    assert_eq!(read.to_string(), written.to_string());
    assert!(!read.is_retryable());
}

#[test]
fn descent_must_make_sense() {
    assert_refused(|m| m.id = CheckpointId(0), "seq is below 1");
    assert_refused(|m| m.parent = Some(CheckpointId(0)), "not an earlier checkpoint");
    assert_refused(|m| m.parent = Some(m.id), "not an earlier checkpoint");
    assert_refused(|m| m.parent = None, "missing though the checkpoint is incremental");
    assert_refused(|m| m.kind = CheckpointKind::Full, "given though the checkpoint is full");
}

#[test]
fn the_first_full_checkpoint_is_fine() {
    let mut first = sample_manifest();
    (first.id, first.parent, first.kind) = (CheckpointId(1), None, CheckpointKind::Full);
    assert_eq!(Manifest::parse(&first.encode().expect("sound")).expect("sound"), first);
}

#[test]
fn times_have_one_shape() {
    for good in ["2026-01-31T23:59:59Z", "2026-01-31T23:59:59.1Z", "2026-01-31T23:59:59.123456789Z"]
    {
        let mut manifest = sample_manifest();
        manifest.created_at = good.into();
        assert!(manifest.encode().is_ok(), "{good}");
    }
    assert_refused(|m| m.created_at = "now".into(), "created_at is no time");
    assert_refused(|m| m.created_at = "2026-01-31T23:59:59".into(), "created_at is no time");
    assert_refused(|m| m.created_at = "2026-01-31T23:59:59.Z".into(), "created_at is no time");
    assert_refused(|m| m.created_at = "2026-01-31 23:59:59Z".into(), "created_at is no time");
    assert_refused(|m| m.created_at = "2026-01-31T23:59:59+01:00".into(), "created_at is no time");
    assert_refused(|m| m.created_at = "2026-01-31T23:59:5éZ".into(), "created_at is no time");
}

#[test]
fn spaces_must_be_sound() {
    assert_refused(|m| m.spaces.push(m.spaces[0].clone()), "holding a name twice");
    assert_refused(|m| m.spaces[0].kind = SpaceKind::State, "of another kind than its name");
    assert_refused(|m| m.spaces[1].bytes = ByteLen(u64::MAX), "larger than a space can be");
    let layer: Change = |m| {
        let name = SpaceName::layer(ContentDigest::of(b""));
        m.spaces.push(SpaceRecord::new(name, ByteLen(0)));
    };
    assert_refused(layer, "belongs to no checkpoint");
    let many: Change = |m| {
        let space = |n| SpaceRecord::new(name(&format!("state:{n}")), ByteLen(0));
        m.spaces.extend((0..MAX_SPACES).map(space));
    };
    assert_refused(many, "4099 spaces, the limit is 4096");
}

#[test]
fn ram_blocks_must_have_their_content() {
    assert_refused(|m| m.ram_blocks.clear(), "machine.ram_block is not among");
    let beyond: Change = |m| {
        m.ram_blocks[0].used = ByteLen(1 << 30);
        m.spaces[0].bytes = ByteLen(1 << 30);
    };
    assert_refused(beyond, "used beyond its size");
    assert_refused(|m| m.ram_blocks[0].page_size = ByteLen(0), "impossible page size");
    let bare: Change = |m| {
        let mut vram = m.ram_blocks[0].clone();
        vram.name = "vga.vram".into();
        m.ram_blocks.push(vram);
    };
    assert_refused(bare, "RAM block vga.vram is without a space");
}

#[test]
fn disks_must_have_their_content() {
    assert_refused(|m| m.disks[0].space = None, "disk root is writable and without a space");
    assert_refused(|m| m.disks[0].read_only = true, "disk root is read-only and yet with a space");
    assert_refused(|m| m.disks[0].space = Some(name("ram:pc.ram")), "space that is not there");
    assert_refused(|m| m.disks[0].format = "vmdk".into(), "disk root is neither qcow2 nor raw");
    assert_refused(|m| m.disks[1].node = "root".into(), "disks is holding a name twice");
    assert_refused(
        |m| m.disks[1].backing[0].format = "vmdk".into(),
        "disk cd is on a layer neither",
    );
    let deep: Change = |m| m.disks[1].backing = vec![m.disks[1].backing[0].clone(); 257];
    assert_refused(deep, "257 layers below a disk, the limit is 256");
}

#[test]
fn packs_must_be_sound() {
    assert_refused(|m| m.packs.push(m.packs[0].clone()), "packs is holding a name twice");
    let same_id: Change = |m| {
        let mut other = m.packs[0].clone();
        other.name = PackName::new("0001.pack").expect("a good name");
        m.packs.push(other);
    };
    assert_refused(same_id, "the packs' ids is holding a name twice");
    assert_refused(|m| m.packs[0].info.len.0 += 1, "the record of pack 0000.pack is wrong");
}

#[test]
fn texts_have_limits() {
    let argument: Change = |m| m.vm_record.arguments.push("x".repeat(MAX_TEXT + 1));
    assert_refused(argument, "machine.arguments is longer than any real one");
    let many: Change = |m| m.vm_record.arguments = vec![String::new(); MAX_ARGUMENTS + 1];
    assert_refused(many, "16385 arguments, the limit is 16384");
    assert_refused(|m| m.vm_record.vcpus = 0, "machine.vcpus is none");
    assert_refused(|m| m.instance.clear(), "instance is empty");
}

#[test]
fn a_field_of_tomorrow_is_skipped() {
    let file = sample_manifest().encode().expect("sound");
    let text = std::str::from_utf8(body(&file)).expect("JSON is text");
    let more = text.replacen('{', "{\"colour\": \"blue\",", 1);
    let read = Manifest::parse(&envelope("stillpoint-manifest", more.as_bytes()));
    assert_eq!(read.expect("sound"), sample_manifest());
}
