//! The devices that a command line makes, held against those that QEMU has.
//!
//! QEMU keeps every device of `-device` (and `device_add`) below `/machine/peripheral` under its
//! id, or without one below `/machine/peripheral-anon`. What a machine type, `-nic`, `-vga`,
//! `-usbdevice` or `-audio` builds is not listed there, so nothing is known of it; neither can it
//! be plugged. Not seen either: a device that went and was replaced by one of the same model and
//! id.

use super::arguments::QemuOption;
use super::form::Form;
use qemu_cmdline::table;
use qmp_bridge::devices::GuestDevice;

const NAMED: &str = "/machine/peripheral/";

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
    let made = |id: Option<String>, driver: String| {
        Some(Expected { path: id.map(|id| format!("{NAMED}{id}")), driver })
    };
    if option.name == "device" {
        return made(form.get("id"), form.get("driver").unwrap_or_default());
    }
    if option.name == "drive" && form.get("if").as_deref() == Some("virtio") {
        return made(None, "virtio-blk-pci".to_owned());
    }
    let (_, id, driver) = table::SHORTHANDS.iter().find(|(name, ..)| *name == option.name)?;
    let is_none = option.name == "debugcon" && option.value() == "none";
    if is_none { None } else { made(id.map(str::to_owned), (*driver).to_owned()) }
}

fn is_model(driver: &str, kind: &str) -> bool {
    driver.is_empty() || table::device_model(driver) == kind
}

#[cfg(test)]
mod test {
    use super::super::arguments::parse;
    use super::*;

    const LINE: &str = r#"-device {"driver":"virtio-balloon-pci","id":"balloon0"} -device virtio-net,netdev=n -device ahci,id=sata -drive file=a,if=virtio"#;

    fn difference_of(devices: &[(&str, &str)]) -> Option<String> {
        let options = parse(&LINE.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap();
        let devices: Vec<GuestDevice> = devices
            .iter()
            .map(|(path, kind)| GuestDevice {
                path: format!("/machine/{path}"),
                kind: (*kind).to_owned(),
            })
            .collect();
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
        assert_eq!(
            difference_of(&more).unwrap(),
            "/machine/peripheral/net7 (virtio-net-pci) was plugged in"
        );
        assert!(
            difference_of(&ALL[1..])
                .unwrap()
                .contains("balloon0 (virtio-balloon-pci) was unplugged")
        );
        assert!(difference_of(&ALL[..3]).unwrap().contains("virtio-blk-pci) was unplugged"));
        let mut other = ALL;
        other[0].1 = "e1000";
        assert!(
            difference_of(&other).unwrap().contains("balloon0 (e1000) was plugged in"),
            "another model under the same id"
        );
    }

    #[test]
    fn shorthands_and_aliases_make_what_qemu_makes() {
        for (line, path, kind) in [
            ("-debugcon file:x", "peripheral/debugcon", "isa-debugcon"),
            ("-device ac97", "peripheral-anon/device[0]", "AC97"),
            ("-device es1370", "peripheral-anon/device[0]", "ES1370"),
            ("-device lsi", "peripheral-anon/device[0]", "lsi53c895a"),
            (
                "-virtfs local,path=/x,mount_tag=t,security_model=none",
                "peripheral-anon/device[0]",
                "virtio-9p-pci",
            ),
        ] {
            let options = parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap();
            let device = |kind: &str| {
                vec![GuestDevice { path: format!("/machine/{path}"), kind: kind.to_owned() }]
            };
            assert_eq!(difference(&options, &device(kind)), None, "{line}");
            assert!(difference(&options, &device("edu")).is_some(), "{line}");
        }
        assert!(!is_model("pci-serial", "pci-serial-4x"), "another model that only begins alike");
    }
}
