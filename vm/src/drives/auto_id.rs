//! The id that QEMU gives to a `-drive` without one: `ide1-cd0`, `floppy0`, `none3`. It is the
//! drive's name in `query-block`.

use crate::launch::arguments::{KeyList, QemuOption};
use std::collections::HashSet;

/// One bus of a machine type's default interface, as far as ids depend on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Board {
    interface: &'static str,
    ide_units: u32,
}

impl Board {
    /// By the versioned name of the machine type.
    pub(super) fn of(machine_type: &str) -> Self {
        // AHCI has one unit on a bus.
        let ide_units = if machine_type.contains("q35") { 1 } else { 2 };
        Self { interface: if machine_type == "microvm" { "none" } else { "ide" }, ide_units }
    }

    /// Units of a bus; none where there is but one bus.
    fn units(self, interface: &str) -> Option<u32> {
        match interface {
            "ide" => Some(self.ide_units),
            "scsi" => Some(7),
            _ => None,
        }
    }
}

type Place = (String, u32, u32);

/// Of each `-drive` in its order: its id, given or made.
pub(super) fn ids(options: &[QemuOption], board: Board) -> Vec<(usize, String)> {
    let mut taken: HashSet<Place> = HashSet::new();
    let mut ids = Vec::new();
    for (number, option) in options.iter().enumerate().filter(|(_, option)| option.name == "drive")
    {
        let keys = option.keys();
        let place = place(&keys, board, &taken);
        let made = name(&keys, board, &place);
        ids.push((number, keys.get("id").map_or(made, str::to_owned)));
        taken.insert(place);
    }
    ids
}

fn place(keys: &KeyList, board: Board, taken: &HashSet<Place>) -> Place {
    let number = |key: &str| keys.get(key).and_then(|value| value.parse::<u32>().ok());
    let interface = keys.get("if").unwrap_or(board.interface).to_owned();
    let units = board.units(&interface);
    if let Some(index) = number("index") {
        return units.map_or((interface.clone(), 0, index), |units| {
            (interface, index / units, index % units)
        });
    }
    let (mut bus, mut unit) = (number("bus").unwrap_or(0), number("unit").unwrap_or(0));
    while number("unit").is_none() && taken.contains(&(interface.clone(), bus, unit)) {
        unit += 1;
        if units == Some(unit) {
            (bus, unit) = (bus + 1, 0);
        }
    }
    (interface, bus, unit)
}

fn name(keys: &KeyList, board: Board, (interface, bus, unit): &Place) -> String {
    let medium = match (interface.as_str(), keys.get("media")) {
        ("ide" | "scsi", Some("cdrom")) => "-cd",
        ("ide" | "scsi", _) => "-hd",
        _ => "",
    };
    match board.units(interface) {
        Some(_) => format!("{interface}{bus}{medium}{unit}"),
        None => format!("{interface}{medium}{unit}"),
    }
}

/// The option that makes a drive which QEMU otherwise makes by itself, empty.
pub(super) fn default_drive(device: &str, board: Board) -> Option<QemuOption> {
    let cdrom = QemuOption::with("drive", "if=ide,index=2,media=cdrom");
    let floppy = QemuOption::with("drive", "if=floppy,index=0");
    [cdrom, floppy]
        .into_iter()
        .find(|option| ids(std::slice::from_ref(option), board)[0].1 == device)
}

#[cfg(test)]
mod test {
    use super::super::test::options;
    use super::*;

    #[test]
    fn drive_id_is_the_one_that_qemu_makes() {
        let line = "-drive file=a -drive file=b -drive file=c -drive index=2,media=cdrom,file=d -drive if=none,id=x \
                    -drive if=none -drive if=floppy,file=f -drive if=virtio,file=v -drive if=scsi,media=cdrom -drive if=pflash,file=p";
        let named = |board: &str| -> Vec<String> {
            ids(&options(line), Board::of(board)).into_iter().map(|(_, id)| id).collect()
        };
        assert_eq!(
            named("pc-i440fx-10.0"),
            [
                "ide0-hd0",
                "ide0-hd1",
                "ide1-hd0",
                "ide1-cd0",
                "x",
                "none1",
                "floppy0",
                "virtio0",
                "scsi0-cd0",
                "pflash0"
            ]
        );
        assert_eq!(named("pc-q35-10.0")[..4], ["ide0-hd0", "ide1-hd0", "ide2-hd0", "ide2-cd0"]);
    }

    #[test]
    fn default_drive_is_found_by_its_id() {
        assert!(default_drive("ide1-cd0", Board::of("pc-i440fx-10.0")).is_some());
        assert!(default_drive("ide2-cd0", Board::of("pc-q35-10.0")).is_some());
        assert!(
            default_drive("floppy0", Board::of("pc-i440fx-7.2"))
                .is_some_and(|option| option.value().contains("floppy"))
        );
        assert!(default_drive("ide1-cd0", Board::of("pc-q35-10.0")).is_none());
    }
}
