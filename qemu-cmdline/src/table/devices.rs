//! What QEMU's device models are called, and which it cannot save. Tests ask QEMU for both.
//!
//! It says so itself of some. Of others it saves nothing, or the wrong memory, without a word: then
//! a restored VM differs from its checkpoint, and no comparison of what was saved can tell.

/// Models that QEMU knows by another word too; `-device help` names them as aliases.
const DEVICE_ALIASES: &[(&str, &str)] = &[
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

/// The model that a word of `-device` is.
pub fn device_model(word: &str) -> &str {
    DEVICE_ALIASES.iter().find(|(alias, _)| *alias == word).map_or(word, |(_, model)| model)
}

/// QEMU says of these that they are not migratable (`-only-migratable`), 7.2 and 10.0 alike; a test
/// asks it again.
pub const UNMIGRATABLE: &[&str] = &[
    "amd-iommu",
    "nvme",
    "rocker",
    "hv-syndbg",
    "usb-audio",
    "usb-braille",
    "usb-mtp",
    "usb-net",
    "usb-serial",
    "usb-uas",
    "usb-wacom-tablet",
    "virtio-crypto-pci",
    "virtio-input-host",
    "virtio-input-host-pci",
    // Not in 7.2.
    "ufs",
    "virtio-sound",
    "virtio-sound-pci",
];

const NOTHING_SAVED: &str = "QEMU saves nothing of its state";
const WRONG_MEMORY: &str = "QEMU saves other memory of its process in place of this card's registers, and may crash when it loads that";

/// Models (or beginnings of their names) that QEMU saves without their state, why, and what to use
/// instead. `-dump-vmstate` lists none of them, or lists the description of a larger device's part.
const UNSAVED: &[(&str, &str, &str)] = &[
    // Their class describes the registers alone, and QEMU applies that to the device around them.
    ("isa-vga", WRONG_MEMORY, "use VGA on a PCI VM"),
    ("isa-cirrus-vga", WRONG_MEMORY, "use cirrus-vga on a PCI VM"),
    ("adlib", NOTHING_SAVED, "use AC97 or intel-hda"),
    ("ati-vga", NOTHING_SAVED, "use VGA or virtio-vga"),
    ("ccid-card-emulated", NOTHING_SAVED, "leave it out"),
    ("cxl-", NOTHING_SAVED, "use pcie-root-port and devices on it"),
    ("edu", NOTHING_SAVED, "leave it out"),
    ("hyperv-testdev", NOTHING_SAVED, "leave it out"),
    ("i2c-echo", NOTHING_SAVED, "leave it out"),
    // A guest in the middle of a key's transfer would find the controller in another command and
    // position.
    ("isa-applesmc", NOTHING_SAVED, "leave it out"),
    ("pc-testdev", NOTHING_SAVED, "leave it out"),
    ("pci-testdev", NOTHING_SAVED, "leave it out"),
    // They have no description, and the class of all PCI devices has none that QEMU would take
    // instead: what firmware and guest wrote into their configuration space is lost. The bridges
    // and ports on them are saved.
    ("pxb", NOTHING_SAVED, "use pci-bridge"),
    ("pxb-cxl", NOTHING_SAVED, "use pcie-root-port and devices on it"),
    ("pxb-pcie", NOTHING_SAVED, "use pcie-root-port and devices on it"),
    // Seen with 10.0: `used_storage` is another number after each load.
    (
        "uefi-vars-",
        "QEMU counts its used storage wrongly when it loads its state",
        "keep the variables in a pflash drive",
    ),
];

/// Why QEMU's saved state lacks what this model holds, and what to use instead; none if it has it.
pub fn unsaved(model: &str) -> Option<(&'static str, &'static str)> {
    let is_it =
        |name: &str| if name.ends_with('-') { model.starts_with(name) } else { model == name };
    UNSAVED.iter().find(|(name, ..)| is_it(name)).map(|(_, why, remedy)| (*why, *remedy))
}

/// The model that `-audio model=` makes, where it is one that cannot be saved.
pub fn audio_model(word: &str) -> &str {
    match word {
        "virtio" => "virtio-sound-pci",
        word => word,
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn unsaved_models_are_found_by_name_or_family() {
        for model in [
            "isa-vga",
            "isa-cirrus-vga",
            "ati-vga",
            "cxl-rp",
            "cxl-type3",
            "edu",
            "isa-applesmc",
            "pxb",
            "pxb-pcie",
            "uefi-vars-x64",
        ] {
            assert!(unsaved(model).is_some(), "{model}");
        }
        for model in
            ["VGA", "cirrus-vga", "educational", "pcie-pci-bridge", "virtio-vga", "isa-vga2"]
        {
            assert_eq!(unsaved(model), None, "{model}");
        }
    }
}
