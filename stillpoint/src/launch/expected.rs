//! The devices that a command line makes, held against those that QEMU has.
//!
//! QEMU keeps every device of `-device` (and `device_add`) below `/machine/peripheral` under its id, or without one below
//! `/machine/peripheral-anon`. What a machine type, `-nic`, `-vga`, `-usbdevice` or `-audio` builds is not listed there, so nothing is
//! known of it; neither can it be plugged. Not seen either: a device that went and was replaced by one of the same model and id.

use super::arguments::QemuOption;
use super::form::Form;
use qmp_bridge::devices::GuestDevice;

const NAMED: &str = "/machine/peripheral/";

/// Options other than `-device` that make a device without an id, and its model.
const SHORTHANDS: &[(&str, &str)] = &[("virtfs", "virtio-9p"), ("watchdog", "")];
/// Models that QEMU knows by another word: word, model.
const ALIASES: &[(&str, &str)] = &[("ahci", "ich9-ahci"), ("e1000-82540em", "e1000"), ("lsi", "lsi53c895a")];

#[derive(Clone, Debug, PartialEq, Eq)]
struct Expected {
    /// Its QOM path; none where it has no id.
    path: Option<String>,
    /// Empty: any.
    driver: String,
}

/// What is there and not on the command line, or the other way round; `None` if all fits.
pub fn difference(options: &[QemuOption], devices: &[GuestDevice]) -> Option<String> {
    let mut missing: Vec<Expected> = options.iter().filter_map(expected).collect();
    for device in devices {
        match missing.iter().position(|expected| expected.is(device)) {
            Some(found) => drop(missing.remove(found)),
            None => return Some(format!("{} ({}) was plugged in", device.path, device.kind)),
        }
    }
    missing.first().map(|gone| match &gone.path {
        Some(path) => format!("{path} ({}) was unplugged", gone.driver),
        None => format!("a device without an id ({}) was unplugged", gone.driver),
    })
}

impl Expected {
    fn is(&self, device: &GuestDevice) -> bool {
        let is_place = match &self.path {
            Some(path) => *path == device.path,
            None => !device.path.starts_with(NAMED),
        };
        is_place && is_model(&self.driver, &device.kind)
    }
}

fn expected(option: &QemuOption) -> Option<Expected> {
    let form = Form::of(option);
    if option.name == "device" {
        return Some(Expected { path: form.get("id").map(|id| format!("{NAMED}{id}")), driver: form.get("driver").unwrap_or_default() });
    }
    let anonymous = |driver: &str| Some(Expected { path: None, driver: driver.to_owned() });
    if option.name == "drive" && form.get("if").as_deref() == Some("virtio") {
        return anonymous("virtio-blk");
    }
    let (_, driver) = SHORTHANDS.iter().find(|(name, _)| *name == option.name)?;
    anonymous(driver)
}

/// `virtio-net` is a `virtio-net-pci` on a PC.
fn is_model(driver: &str, kind: &str) -> bool {
    let aliased = ALIASES.iter().find(|(word, _)| *word == driver).map_or(driver, |(_, model)| model);
    aliased.is_empty() || aliased == kind || kind.strip_prefix(aliased).is_some_and(|rest| rest.starts_with('-'))
}

#[cfg(test)]
mod test {
    use super::super::arguments::parse;
    use super::*;

    const LINE: &str = r#"-device {"driver":"virtio-balloon-pci","id":"balloon0"} -device virtio-net,netdev=n -device ahci,id=sata -drive file=a,if=virtio"#;

    fn difference_of(devices: &[(&str, &str)]) -> Option<String> {
        let options = parse(&LINE.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap();
        let devices: Vec<GuestDevice> =
            devices.iter().map(|(path, kind)| GuestDevice { path: format!("/machine/{path}"), kind: (*kind).to_owned() }).collect();
        difference(&options, &devices)
    }

    const ALL: [(&str, &str); 4] = [
        ("peripheral/balloon0", "virtio-balloon-pci"),
        ("peripheral/sata", "ich9-ahci"),
        ("peripheral-anon/device[0]", "virtio-net-pci"),
        ("peripheral-anon/device[1]", "virtio-blk-pci"),
    ];

    #[test]
    fn what_the_command_line_makes_fits() {
        assert_eq!(difference_of(&ALL), None);
    }

    #[test]
    fn what_came_or_went_is_named() {
        let mut more = ALL.to_vec();
        more.push(("peripheral/net7", "virtio-net-pci"));
        assert_eq!(difference_of(&more).unwrap(), "/machine/peripheral/net7 (virtio-net-pci) was plugged in");
        assert!(difference_of(&ALL[1..]).unwrap().contains("balloon0 (virtio-balloon-pci) was unplugged"));
        assert!(difference_of(&ALL[..3]).unwrap().contains("virtio-blk) was unplugged"));
        let mut other = ALL;
        other[0].1 = "e1000";
        assert!(difference_of(&other).unwrap().contains("balloon0 (e1000) was plugged in"), "another model under the same id");
    }
}
