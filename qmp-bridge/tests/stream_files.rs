//! Streams that QEMU 7.2 and 10.0 wrote, whole, cut and damaged. `tests/stream_record.rs` makes
//! them.

mod common;
mod streams;

use proptest::prelude::*;
use qmp_bridge::stream_reader::{ReaderLimits, StreamReadError};
use streams::check::{Facts, Pieces, limits, read_all};
use streams::{recorded, seeds};

const SECTION_FULL: u8 = 4;

fn whole(bytes: &[u8]) -> Result<Facts, StreamReadError> {
    read_all(bytes, ReaderLimits::default())
}

fn facts_of(name: &str) -> Facts {
    let (_, bytes) = recorded().into_iter().find(|(is, _)| is == name).expect("recorded");
    whole(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn names(facts: &Facts) -> Vec<&str> {
    facts.devices.iter().map(|(name, _)| name.as_str()).collect()
}

#[test]
fn all_are_read_whole() {
    let all = recorded();
    assert_eq!(all.len(), 14, "seven VMs of two versions");
    for (name, bytes) in all {
        let facts = whole(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        let total: u64 = facts.blocks.iter().map(|(_, used)| used / 4096).sum();
        let sent = (facts.pages + facts.zeros) as u64;
        assert!(sent >= total, "{name}: {sent} of {total} pages");
        if name.ends_with("background") {
            assert_eq!(sent, total, "{name}: each page once");
        }
        assert!(facts.passes >= 1 && facts.capabilities.is_empty(), "{name}");
        assert_eq!(facts.devices.first(), Some(&("timer".into(), 0)), "{name}");
        assert_eq!(facts.devices.last(), Some(&("globalstate".into(), 0)), "{name}");
        assert_eq!(facts.state[8], SECTION_FULL, "{name}");
    }
}

#[test]
fn what_is_known_of_some_of_them() {
    for version in ["7.2", "10.0"] {
        let pc = facts_of(&format!("{version}-pc-precopy"));
        assert_eq!(pc.machine_type, format!("pc-i440fx-{version}"));
        let blocks: Vec<_> = pc.blocks.iter().map(|(name, used)| (name.as_str(), *used)).collect();
        let wanted = [
            ("/rom@etc/acpi/tables", 128 << 10),
            ("pc.ram", 1 << 20),
            ("0000:00:02.0/vga.vram", 1 << 20),
            ("pc.rom", 128 << 10),
            ("pc.bios", 64 << 10),
            ("/rom@etc/table-loader", 4096),
            ("/rom@etc/acpi/rsdp", 4096),
        ];
        assert_eq!(blocks, wanted);
        assert!(pc.pages >= 5 && pc.zeros > 500, "{} pages, {} zeros", pc.pages, pc.zeros);
        let devices = names(&pc);
        for device in [
            "cpu",
            "fw_cfg",
            "0000:00:01.1/ide",
            "0000:00:02.0/vga",
            "0000:00:03.0/virtio-blk",
            "acpi_build",
        ] {
            assert!(devices.contains(&device), "{version}: {device} is not in {devices:?}");
        }
        assert_eq!(
            pc.devices
                .iter()
                .filter(|(name, _)| name == "i8259")
                .map(|(_, instance)| *instance)
                .collect::<Vec<_>>(),
            [0, 1]
        );

        let q35 = facts_of(&format!("{version}-q35-background"));
        assert_eq!(q35.machine_type, format!("pc-q35-{version}"));
        assert!(
            names(&q35).contains(&"0000:00:1f.2/ich9_ahci")
                && names(&q35).contains(&"0000:00:02.0/virtio-blk")
        );

        let none = facts_of(&format!("{version}-none-precopy"));
        assert_eq!((none.blocks, none.pages, none.zeros), (vec![("ram".into(), 1 << 20)], 0, 256));
        assert_eq!(none.devices.len(), 2);
        assert_eq!(facts_of(&format!("{version}-microvm-precopy")).machine_type, "microvm");
    }
}

/// What comes does not depend on how the bytes came.
#[test]
fn pieces_of_any_size() {
    for (name, bytes) in recorded() {
        let wanted = whole(&bytes).expect("whole");
        for (size, buffer) in
            [(1, 0), (7, 0), (4096, 0), (8192, 8192), (9000, 8193), (100_000, 1 << 20)]
        {
            let limits = ReaderLimits { read_buffer: buffer, ..ReaderLimits::default() };
            assert_eq!(
                read_all(Pieces { bytes: &bytes, size }, limits).expect("whole"),
                wanted,
                "{name} by {size}"
            );
        }
    }
}

/// Where the device part begins: its content stands in the stream as it is.
fn device_part(bytes: &[u8]) -> usize {
    let sections = whole(bytes).expect("whole").state[8..].to_vec();
    bytes.windows(sections.len()).position(|window| window == sections).expect("device part")
}

fn assert_cut(name: &str, bytes: &[u8], devices: usize, length: usize) {
    let error = whole(&bytes[..length]).expect_err("a part is never taken for the whole");
    let described = matches!(error, StreamReadError::NoDescription { .. });
    assert!(error.is_cut_off() || described && length > devices, "{name} cut at {length}: {error}");
    let at = match error {
        StreamReadError::CutOff { at, .. } | StreamReadError::NoDescription { at } => at,
        other => panic!("{name} cut at {length}: {other}"),
    };
    assert_eq!(at, length as u64, "{name}");
}

#[test]
fn a_small_one_cut_at_every_byte() {
    for (name, bytes) in recorded().into_iter().filter(|(_, bytes)| bytes.len() < 4000) {
        let devices = device_part(&bytes);
        for length in 0..bytes.len() {
            assert_cut(&name, &bytes, devices, length);
        }
    }
}

#[test]
fn all_cut_at_many_places() {
    for (name, bytes) in recorded() {
        let devices = device_part(&bytes);
        for step in 0..400 {
            assert_cut(&name, &bytes, devices, bytes.len() * step / 400);
        }
        // Around the beginning of the description, the one place that looks like an end.
        for length in devices + 1..(devices + 200).min(bytes.len()) {
            assert_cut(&name, &bytes, devices, length);
        }
    }
}

/// What the fuzzer begins with: streams made by hand, and those that once went wrong.
#[test]
fn seeds_of_the_fuzzer() {
    let seeds = seeds();
    let sound: Vec<_> = seeds
        .iter()
        .filter(|(_, input)| {
            Pieces::of_fuzzer(input).is_some_and(|pieces| read_all(pieces, limits()).is_ok())
        })
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(
        sound,
        ["10.0-none-precopy", "7.2-none-background", "background", "page", "precopy", "shared"]
    );
    assert!(seeds.len() >= 12);
}

#[derive(Debug, Clone)]
enum Damage {
    Flip { at: u32, bit: u8 },
    Set { at: u32, byte: u8 },
    Number { at: u32, value: u64 },
    Remove { at: u32, length: u16 },
    Repeat { at: u32, length: u16 },
    Cut { at: u32 },
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<u32>();
    prop_oneof![
        (at, 0..8u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        (at, any::<u8>()).prop_map(|(at, byte)| Damage::Set { at, byte }),
        (at, prop_oneof![Just(u64::MAX), Just(0), Just(1 << 63), 0..0x3000u64])
            .prop_map(|(at, value)| Damage::Number { at, value }),
        (at, 1..5000u16).prop_map(|(at, length)| Damage::Remove { at, length }),
        (at, 1..5000u16).prop_map(|(at, length)| Damage::Repeat { at, length }),
        at.prop_map(|at| Damage::Cut { at }),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    let place = |at: u32| at as usize % bytes.len().max(1);
    match *damage {
        _ if bytes.is_empty() => {}
        Damage::Flip { at, bit } => {
            let at = place(at);
            bytes[at] ^= 1 << bit;
        }
        Damage::Set { at, byte } => {
            let at = place(at);
            bytes[at] = byte;
        }
        Damage::Number { at, value } => {
            let (at, value) = (place(at), value.to_be_bytes());
            let length = value.len().min(bytes.len() - at);
            bytes[at..at + length].copy_from_slice(&value[..length]);
        }
        Damage::Remove { at, length } => {
            let at = place(at);
            bytes.drain(at..(at + usize::from(length)).min(bytes.len()));
        }
        Damage::Repeat { at, length } => {
            let at = place(at);
            let again = bytes[at..(at + usize::from(length)).min(bytes.len())].to_vec();
            bytes.splice(at..at, again);
        }
        Damage::Cut { at } => {
            let at = place(at);
            bytes.truncate(at);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens to a stream, the reader gives what it promises or an error, which names a
    /// place in the stream.
    #[test]
    fn damaged_ones(choice in any::<prop::sample::Index>(), all in prop::collection::vec(damage(), 1..6), size in 1..20_000usize) {
        thread_local!(static RECORDED: Vec<(String, Vec<u8>)> = recorded());
        let mut bytes = RECORDED.with(|recorded| choice.get(recorded).1.clone());
        for damage in &all {
            apply(&mut bytes, damage);
        }
        if let Err(error) = read_all(Pieces { bytes: &bytes, size }, limits()) {
            let at = match &error {
                StreamReadError::Malformed { at, .. } | StreamReadError::Unsupported { at, .. } => *at,
                StreamReadError::TooLarge { at, .. } | StreamReadError::NoDescription { at } => *at,
                StreamReadError::CutOff { at, .. } | StreamReadError::Description { at, .. } => *at,
                StreamReadError::NotUnderstood { .. } => 0,
                other => panic!("{other}"),
            };
            prop_assert!(at <= bytes.len() as u64, "{error}");
            prop_assert!(error.to_string().len() < 4000, "{error}");
        }
    }
}
