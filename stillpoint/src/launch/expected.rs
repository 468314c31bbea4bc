//! The devices that a command line makes, held against those that QEMU has.
//!
//! QEMU keeps every device of `-device` (and `device_add`) below `/machine/peripheral` under its id, or without one below
//! `/machine/peripheral-anon`. What a machine type, `-nic`, `-vga`, `-usbdevice` or `-audio` builds is not listed there, so nothing is
//! known of it; neither can it be plugged. Not seen either: a device that went and was replaced by one of the same model and id.

use super::arguments::QemuOption;
use super::form::Form;
use qmp_bridge::devices::GuestDevice;

const NAMED: &str = "/machine/peripheral/";

/// Options other than `-device` that make a device without an id, and its model; empty for any.
const SHORTHANDS: &[(&str, &str)] =
    &[("virtfs", "virtio-9p-pci"), ("debugcon", "isa-debugcon"), ("virtioserial", "virtio-serial-pci"), ("watchdog", "")];
/// Models that QEMU knows by another word too; `-device help` names them as aliases.
const ALIASES: &[(&str, &str)] = &[
    ("ac97", "AC97"),
    ("ahci", "ich9-ahci"),
    ("e1000-82540em", "e1000"),
    ("es1370", "ES1370"),
    ("lsi", "lsi53c895a"),
    ("virtio-9p", "virtio-9p-pci"),
    ("virtio-balloon", "virtio-balloon-pci"),
    ("virtio-blk", "virtio-blk-pci"),
    ("virtio-gpu", "virtio-gpu-pci"),
    ("virtio-gpu-gl", "virtio-gpu-gl-pci"),
    ("virtio-input-host", "virtio-input-host-pci"),
    ("virtio-iommu", "virtio-iommu-pci"),
    ("virtio-keyboard", "virtio-keyboard-pci"),
    ("virtio-mouse", "virtio-mouse-pci"),
    ("virtio-multitouch", "virtio-multitouch-pci"),
    ("virtio-net", "virtio-net-pci"),
    ("virtio-rng", "virtio-rng-pci"),
    ("virtio-scsi", "virtio-scsi-pci"),
    ("virtio-serial", "virtio-serial-pci"),
    ("virtio-sound", "virtio-sound-pci"),
    ("virtio-tablet", "virtio-tablet-pci"),
];

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
        return anonymous("virtio-blk-pci");
    }
    if option.name == "debugcon" && option.value() == "none" {
        return None;
    }
    let (_, driver) = SHORTHANDS.iter().find(|(name, _)| *name == option.name)?;
    anonymous(driver)
}

fn is_model(driver: &str, kind: &str) -> bool {
    driver.is_empty() || driver == kind || ALIASES.contains(&(driver, kind))
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
        assert!(difference_of(&ALL[..3]).unwrap().contains("virtio-blk-pci) was unplugged"));
        let mut other = ALL;
        other[0].1 = "e1000";
        assert!(difference_of(&other).unwrap().contains("balloon0 (e1000) was plugged in"), "another model under the same id");
    }

    #[test]
    fn shorthands_and_aliases_make_what_qemu_makes() {
        for (line, kind) in [
            ("-debugcon file:x", "isa-debugcon"),
            ("-device ac97", "AC97"),
            ("-device es1370", "ES1370"),
            ("-device lsi", "lsi53c895a"),
            ("-virtfs local,path=/x,mount_tag=t,security_model=none", "virtio-9p-pci"),
        ] {
            let options = parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap();
            let device = |kind: &str| vec![GuestDevice { path: "/machine/peripheral-anon/device[0]".to_owned(), kind: kind.to_owned() }];
            assert_eq!(difference(&options, &device(kind)), None, "{line}");
            assert!(difference(&options, &device("edu")).is_some(), "{line}");
        }
        assert!(!is_model("pci-serial", "pci-serial-4x"), "another model that only begins alike");
    }
}
