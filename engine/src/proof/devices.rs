//! The device state as the restored QEMU writes it again, before the guest runs, held against the
//! stored one: section by section, byte by byte.
//!
//! QEMU's virtual clock is stopped from the load on, and the real-time clock is put on it (see
//! [`super::isolate`]), so that timers and counters are written as they were read and no interrupt
//! comes in between. What may differ is in [`CHANGING`], each with its reason and no wider than a
//! field; the same on QEMU 7.2 and 10.0.

use super::difference::Difference;
use super::memory::Resaved;
use anyhow::{Result, ensure};
use qmp_bridge::device_sections::{Layout, sections_like};
use qmp_bridge::device_state::DeviceState;
use qmp_bridge::stream_reader::DeviceSection;
use std::ops::RangeInclusive;

/// Bytes of each value that a difference quotes.
const QUOTED: usize = 8;

/// A field that cannot be the same.
struct Changing {
    /// The section, without the place of its device.
    section: &'static str,
    /// The field, or the structure that it is in.
    field: &'static str,
    part: Part,
    /// Only in a VM that has this section.
    with: Option<&'static str>,
    why: &'static str,
}

/// Bytes of a field.
enum Part {
    All,
    /// At these offsets.
    At(&'static [u64]),
    /// So far before its end, the last byte being 1 before it.
    BeforeEnd(&'static [RangeInclusive<u64>]),
}

impl Part {
    /// `place` is an offset in the field, `left` counts the bytes from there to its end.
    fn has(&self, place: u64, left: u64) -> bool {
        match self {
            Self::All => true,
            Self::At(offsets) => offsets.contains(&place),
            Self::BeforeEnd(ranges) => ranges.iter().any(|range| range.contains(&left)),
        }
    }
}

const fn changing(section: &'static str, field: &'static str, why: &'static str) -> Changing {
    Changing { section, field, part: Part::All, with: None, why }
}

const fn new_id(section: &'static str, field: &'static str) -> Changing {
    let why = "QEMU tells the guest that it has a new generation id, by an ACPI interrupt, when it loads it";
    Changing { section, field, part: Part::All, with: Some("vmgenid"), why }
}

const HOST_CLOCK: &str = "counted in the host's clock, on which it is set again when it is loaded";

const CHANGING: &[Changing] = &[
    Changing {
        section: "mc146818rtc",
        field: "cmos_data",
        // Seconds, minutes, hours, weekday, day, month, year, century.
        part: Part::At(&[0, 2, 4, 6, 7, 8, 9, 0x32]),
        with: None,
        why: "QEMU computes date and time again when it writes them",
    },
    changing("mc146818rtc", "periodic_timer", HOST_CLOCK),
    changing("mc146818rtc", "next_periodic_time", HOST_CLOCK),
    changing("mc146818rtc", "update_timer", HOST_CLOCK),
    changing("mc146818rtc", "next_alarm_time", HOST_CLOCK),
    changing(
        "ide",
        "bmdma.migration_retry_",
        "QEMU reads them back only for a transfer that failed",
    ),
    changing(
        "kvmclock",
        "clock",
        "QEMU reads KVM's clock when it writes it, unless the guest was stopped by a command",
    ),
    changing("qxl", "ssd.unique", "counts what QEMU has drawn, also when it is loaded"),
    Changing {
        section: "tpm-emulator",
        field: "volatil.buffer",
        // As libtpms ends the volatile state of a TPM 2.0: the date, three seeds of 66 bytes, the
        // host's clock, the time for which the TPM was stopped, two times that stay, a mark, and a
        // SHA-1 of all of it; between them the lengths of blocks.
        part: Part::BeforeEnd(&[1..=20, 44..=59, 264..=271]),
        with: None,
        why: "swtpm reads its clocks when it writes them, with a checksum that it has checked at the load",
    },
    changing("globalstate", "runstate", "the run state when it was written; the VM is paused here"),
    changing("globalstate", "size", "the length of the run state's name"),
    new_id("piix4_pm", "gpe.sts"),
    new_id("ICH9LPC", "gpe.sts"),
    new_id("cpu_common", "interrupt_request"),
    new_id("ioapic", "irr"),
    new_id("i8259", "irr"),
];

/// What the comparison of the device state found.
#[derive(Default)]
pub(super) struct Devices {
    pub differences: Vec<Difference>,
    /// Sections that were the same, byte for byte.
    pub same: usize,
    /// Differ, and may: section, reason.
    pub excused: Vec<(String, &'static str)>,
}

/// Holds the sections that QEMU wrote again against the stored ones.
pub(super) fn compare(stored: &DeviceState, resaved: &Resaved) -> Result<Devices> {
    let mut found = Devices::default();
    let old = sections_like(stored, &resaved.sections)?;
    ensure!(!old.is_empty(), "the stored device state has no section");
    let is_same = |one: &DeviceSection, other: &DeviceSection| {
        (one.name.as_str(), one.instance) == (other.name.as_str(), other.instance)
    };
    let has = |name: &str| old.iter().any(|section| section.name.rsplit('/').next() == Some(name));
    for section in &old {
        let Some(now) = resaved.sections.iter().find(|other| is_same(section, other)) else {
            found
                .differences
                .push(Difference::noted(label(section), "the restored QEMU has no such section"));
            continue;
        };
        let before = section.body(&stored.as_bytes()[section.bytes.clone()]);
        let body = now.body(&resaved.devices.as_bytes()[now.bytes.clone()]);
        compare_one(now, (before, body), &resaved.layout, &has, &mut found);
    }
    let new =
        resaved.sections.iter().filter(|section| !old.iter().any(|other| is_same(section, other)));
    found.differences.extend(
        new.map(|section| Difference::noted(label(section), "the checkpoint has no such section")),
    );
    Ok(found)
}

fn label(section: &DeviceSection) -> String {
    format!("state:device/{}", section.label())
}

fn compare_one(
    section: &DeviceSection,
    (before, now): (&[u8], &[u8]),
    layout: &Layout,
    has: &dyn Fn(&str) -> bool,
    found: &mut Devices,
) {
    if before == now {
        found.same += 1;
        return;
    }
    let mut difference = Difference::new(label(section));
    if before.len() != now.len() {
        difference.note =
            Some(format!("{} bytes long, {} in the checkpoint", now.len(), before.len()));
    }
    for at in (0..before.len().min(now.len())).filter(|at| before[*at] != now[*at]) {
        let field = layout.field(section, at as u64);
        let left = |field: &str, place: u64| {
            let length = layout.range(section, field).map_or(0, |range| range.len() as u64);
            length.saturating_sub(place)
        };
        let excused = |(field, place): &(String, u64)| {
            excuse(&section.name, field, (*place, left(field, *place)), has)
        };
        match field.as_ref().and_then(excused) {
            Some(why) => {
                let excused = (label(section), why);
                if !found.excused.contains(&excused) {
                    found.excused.push(excused);
                }
            }
            None => {
                if difference.bytes == 0 && difference.note.is_none() {
                    difference.note = Some(quote(
                        field.map_or_else(|| "?".to_owned(), |(field, _)| field),
                        before,
                        now,
                        at,
                    ));
                }
                difference.push(at as u64..at as u64 + 1);
            }
        }
    }
    found.differences.extend(difference.found());
}

fn quote(field: String, before: &[u8], now: &[u8], at: usize) -> String {
    let hex = |bytes: &[u8]| {
        bytes[at..bytes.len().min(at + QUOTED)]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    format!("first in field {field}: {} where the checkpoint has {}", hex(now), hex(before))
}

/// `place` is an offset in the field, and what is left of the field from there; `has` says whether
/// the VM has a section.
fn excuse(
    section: &str,
    field: &str,
    (place, left): (u64, u64),
    has: &dyn Fn(&str) -> bool,
) -> Option<&'static str> {
    let name = section.rsplit('/').next().unwrap_or(section);
    let is_it = |changing: &&Changing| {
        let is_place = changing.part.has(place, left);
        changing.section == name
            && field.contains(changing.field)
            && is_place
            && changing.with.is_none_or(has)
    };
    CHANGING.iter().find(is_it).map(|changing| changing.why)
}

/// Guest memory that QEMU itself writes when it loads a device: section, field with the address,
/// length, and why. The field is big-endian, of a `_le` one the other way round.
const LOADED: &[(&str, &str, u64, &str)] = &[
    (
        "kvmvapic",
        "rom_state_paddr",
        4096,
        "QEMU notes the TPR shadow of the boot ROM there when it loads it",
    ),
    (
        "kvmvapic",
        "vapic_paddr",
        4096,
        "QEMU writes the interrupt priorities there when it loads them",
    ),
    ("cpu", "env.system_time_msr", 32, "KVM writes its clock there when it gets the register"),
    ("cpu", "env.wall_clock_msr", 16, "KVM writes the date there when it gets the register"),
    ("vmgenid", "vgia_le", 16, "a restored VM has a new generation id"),
    ("vmgenid", "vmgenid_addr_le", 16, "a restored VM has a new generation id"),
];

/// Guest-physical ranges that a load writes, and why.
pub(super) fn written_by_load(resaved: &Resaved) -> Vec<(std::ops::Range<u64>, &'static str)> {
    let mut found = Vec::new();
    for section in &resaved.sections {
        let body = section.body(&resaved.devices.as_bytes()[section.bytes.clone()]);
        for (_, field, length, why) in LOADED.iter().filter(|(name, ..)| section.name == *name) {
            let bytes = resaved
                .layout
                .range(section, field)
                .and_then(|range| body.get(range))
                .unwrap_or_default();
            let is_little = field.ends_with("_le");
            let shift = |address: u64, byte: &u8| address << 8 | u64::from(*byte);
            let address = if is_little {
                bytes.iter().rev().fold(0, shift)
            } else {
                bytes.iter().fold(0, shift)
            };
            if address != 0 {
                found.push((address..address.saturating_add(*length), *why));
            }
        }
    }
    found
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn only_the_clock_of_the_cmos_is_excused() {
        let why = |section: &str, field: &str, place: u64| {
            excuse(section, field, (place, 0), &|_| false).is_some()
        };
        assert!(
            why("mc146818rtc", "cmos_data", 2)
                && why("0000:00:01.1/ide", "bmdma.migration_retry_unit", 0)
        );
        assert!(
            !why("mc146818rtc", "cmos_data", 0x10)
                && !why("mc146818rtc", "cmos_index", 0)
                && !why("ide", "bmdma.cmd", 0)
        );
        assert!(
            !why("piix4_pm", "ar.gpe.sts", 0)
                && excuse("piix4_pm", "ar.gpe.sts", (0, 0), &|name| name == "vmgenid").is_some()
        );
    }
    #[test]
    fn only_the_clocks_of_a_tpm_are_excused() {
        let why = |left| {
            excuse("tpm-emulator", "state_blobs.volatil.buffer", (0, left), &|_| false).is_some()
        };
        assert!(why(1) && why(20) && why(44) && why(59) && why(264) && why(271));
        assert!(!why(0) && !why(21) && !why(43) && !why(60) && !why(263) && !why(272));
        assert!(
            excuse("tpm-emulator", "state_blobs.permanent.buffer", (0, 1), &|_| false).is_none()
        );
    }
}
