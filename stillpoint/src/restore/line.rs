//! The saved command line, made that of the restored VM: the user's own values, files and sockets in its directory.

use super::ports;
use crate::cli::Mapping;
use crate::exit::refused;
use crate::launch::arguments;
use anyhow::Result;
use qemu_cmdline::form::Form;
use qemu_cmdline::restorable::{self, Mapped, Wishes};
use qemu_cmdline::{QemuOption, Use, visit};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Values that an error lists.
const LISTED: usize = 20;
/// Devices by which a guest is in a network, where a second one of the same MAC address disturbs the first.
const SHARED_NETWORKS: &[&str] = &["tap", "bridge", "socket", "stream", "dgram", "vde", "l2tpv3", "af-xdp", "netmap", "vmnet-bridged", "vmnet-host", "vmnet-shared"];

/// The saved options with the user's values in them, and with everything that QEMU makes moved into the VM's directory.
pub fn prepare(saved: &[String], map: &[Mapping], is_copy: bool) -> Result<Mapped> {
    let options = arguments::parse(saved)?;
    let map = resolve(&options, map)?;
    let mut mapped = restorable::map(options, &Wishes { map, ..Wishes::default() });
    // The copy's guest must notice that it is one: random numbers and tokens that it has made are those of the original, too.
    if is_copy {
        mapped.rewrite(|site| (site.option == "device" && site.key == "guid").then(|| "auto".to_owned()));
    }
    for (old, new) in mapped.relocate(&[]) {
        tracing::info!(old, new, "moved into the VM's directory");
    }
    Ok(mapped)
}

/// Splits each `OLD=NEW` where OLD is a value of the saved command line, which may hold `=` itself; of several such OLDs the
/// longest is meant.
fn resolve(options: &[QemuOption], map: &[Mapping]) -> Result<Vec<(String, String)>> {
    map.iter().map(|wish| resolve_one(options, wish)).collect()
}

fn resolve_one(options: &[QemuOption], wish: &Mapping) -> Result<(String, String)> {
    let splits = wish.splits();
    let unused = restorable::map(options.to_vec(), &Wishes { map: splits.clone(), ..Wishes::default() }).unused;
    let known = splits.into_iter().filter(|(old, _)| !unused.contains(old));
    match known.max_by_key(|(old, _)| old.len()) {
        Some(split) => Ok(split),
        None => Err(refused(format!(
            "--map {wish}: no whole value of the saved command line is the part before '='; it has: {}",
            candidates(options).join(" ")
        ))),
    }
}

/// What one may want to map: everything but words that mean the same on every host.
fn candidates(options: &[QemuOption]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    visit(options, |site| {
        if site.means != Use::Plain && !site.value.is_empty() && !found.iter().any(|known| known == site.value) {
            found.push(site.value.to_owned());
        }
    });
    let more = found.len().saturating_sub(LISTED);
    found.truncate(LISTED);
    if more > 0 {
        found.push(format!("and {more} more"));
    }
    if found.is_empty() { vec!["none that is of this host".to_owned()] } else { found }
}

/// The files and sockets that QEMU makes in the VM's directory.
pub fn made_in(options: &[QemuOption], dir: &Path) -> Vec<PathBuf> {
    let mut made = Vec::new();
    visit(options, |site| {
        let path = dir.join(site.value);
        if matches!(site.means, Use::Output | Use::Listen) && path.starts_with(dir) && !made.contains(&path) {
            made.push(path);
        }
    });
    made
}

/// Refuses what would take something away from another VM or from this host: files and sockets that exist, ports and taps in use.
pub fn check_free(options: &[QemuOption], dir: &Path) -> Result<()> {
    let mut taken = Vec::new();
    visit(options, |site| {
        if !matches!(site.means, Use::Output | Use::Listen) {
            return;
        }
        let path = dir.join(site.value);
        let Ok(facts) = path.symlink_metadata() else { return };
        // A terminal, a pipe or /dev/null is there to be written to.
        let kind = std::fs::metadata(&path).unwrap_or(facts).file_type();
        if kind.is_file() || kind.is_socket() || kind.is_symlink() {
            let new = format!("{}-new", site.value);
            taken.push(format!(
                "{} (-{}) exists already, and QEMU would replace it: use another --dir, remove it, or --map {}={new}",
                path.display(),
                site.option,
                site.value
            ));
        }
    });
    taken.extend(ports::taken(options));
    taken.dedup();
    if taken.is_empty() { Ok(()) } else { Err(refused(format!("nothing was made: {}", taken.join("; ")))) }
}

/// What the user of a copy should know of the network that it shares with its original.
pub fn note_of_copy(options: &[QemuOption]) -> Option<String> {
    let is_shared = |option: &QemuOption| {
        matches!(option.name.as_str(), "netdev" | "nic" | "net")
            && Form::of(option).get("type").is_some_and(|kind| SHARED_NETWORKS.contains(&kind.as_str()))
    };
    options.iter().any(is_shared).then(|| {
        "the copy has its original's MAC and IP addresses: while the original runs, they must not be in one network (docs/copies.md)"
            .to_owned()
    })
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::exit::{REFUSED, code_of};
    use std::os::unix::net::UnixListener;

    fn saved(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    fn line(text: &str, map: &[&str], is_copy: bool) -> Result<String> {
        let map: Vec<Mapping> = map.iter().map(|text| text.parse().unwrap()).collect();
        Ok(arguments::words(&prepare(&saved(text), &map, is_copy)?.options).join(" "))
    }

    #[test]
    fn copy_makes_nothing_outside_its_directory() {
        let text = "-qmp unix:/run/a/q.sock,server=on,wait=off -serial file:/var/log/s.log -pidfile /run/q.sock -D /x/q.log -vnc unix:/run/b/q.sock \
                    -chardev socket,id=c,path=/run/c.sock,server=on,wait=off,logfile=/var/log/c.log";
        assert_eq!(
            line(text, &[], true).unwrap(),
            "-qmp unix:q.sock,server=on,wait=off -serial file:s.log -pidfile q.sock.2 -D q.log -vnc unix:q.sock.3 \
             -chardev socket,id=c,path=c.sock,server=on,wait=off,logfile=c.log"
        );
    }

    #[test]
    fn map_is_split_where_a_saved_value_ends() {
        let text = "-spice port=5930,disable-ticketing=on -netdev user,id=n,hostfwd=tcp::1-:22";
        let mapped = |map: &str| line(text, &[map], false).unwrap();
        assert!(mapped("port=5930,disable-ticketing=on=port=5931").starts_with("-spice port=5931 "));
        assert!(mapped("tcp::1-:22=tcp::2-:22").ends_with("hostfwd=tcp::2-:22"));
        let error = line(text, &["nothing=x"], false).unwrap_err();
        assert_eq!(code_of(&error), REFUSED);
        assert!(error.to_string().contains("tcp::1-:22"), "{error}");
        assert!("x".parse::<Mapping>().is_err() && "=x".parse::<Mapping>().is_err());
    }

    #[test]
    fn copy_gets_a_new_generation_id() {
        let text = "-device vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87,id=g";
        assert_eq!(line(text, &[], true).unwrap(), "-device vmgenid,guid=auto,id=g");
        assert_eq!(line(text, &[], false).unwrap(), text);
    }

    #[test]
    fn copy_replaces_no_file_and_no_socket() {
        let place = tempfile::tempdir().unwrap();
        let options = arguments::parse(&saved("-serial file:s.log -qmp unix:q.sock,server=on -D /dev/null")).unwrap();
        check_free(&options, place.path()).unwrap();
        assert_eq!(made_in(&options, place.path()), [place.path().join("s.log"), place.path().join("q.sock")]);
        let _listener = UnixListener::bind(place.path().join("q.sock")).unwrap();
        let error = check_free(&options, place.path()).unwrap_err();
        assert!(code_of(&error) == REFUSED && error.to_string().contains("--map q.sock="), "{error}");
        std::os::unix::fs::symlink("nowhere", place.path().join("s.log")).unwrap();
        assert!(check_free(&options, place.path()).unwrap_err().to_string().contains("s.log"));
    }

    #[test]
    fn copy_in_a_shared_network_is_told() {
        let note = |line: &str| note_of_copy(&arguments::parse(&saved(line)).unwrap()).is_some();
        assert!(note("-netdev tap,id=n,ifname=tap0,script=no") && note("-netdev socket,id=n,mcast=230.0.0.1:1234"));
        assert!(!note("-netdev user,id=n -device e1000,netdev=n"));
    }
}
