//! What a restore checks of the new command line before it makes anything: the user's `--map`, and
//! that nothing which another VM or this host has is taken away.

use super::disks::Places;
use super::ports;
use anyhow::{Error, Result};
use qemu_cmdline::form::Form;
use qemu_cmdline::restorable::{self, Wishes};
use qemu_cmdline::{QemuOption, Use, rewrite, visit};
use serde::{Deserialize, Serialize};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use vm::error::{EngineError, InPhase, Phase, explain, refused};
use vm::launch::arguments;
use vm::launch::paths::NewPaths;
use vm::launch::saved;

/// Values that an error lists.
const LISTED: usize = 20;
/// Networks in which a second guest of the same MAC address disturbs the first.
const SHARED_NETWORKS: &[&str] = &[
    "tap",
    "bridge",
    "socket",
    "stream",
    "dgram",
    "vde",
    "l2tpv3",
    "af-xdp",
    "netmap",
    "vmnet-bridged",
    "vmnet-host",
    "vmnet-shared",
];

/// `OLD=NEW`. Either may hold `=` itself, so where it is split is found out with the saved command
/// line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping(String);

impl Mapping {
    /// That of one of several copies, by its name and its number among them.
    pub fn of_copy(&self, name: &str, number: usize) -> Self {
        Self(self.0.replace("{name}", name).replace("{number}", &number.to_string()))
    }

    /// Every OLD and NEW that it may mean.
    pub(crate) fn splits(&self) -> Vec<(String, String)> {
        let split = |(at, _): (usize, &str)| (self.0[..at].to_owned(), self.0[at + 1..].to_owned());
        self.0.match_indices('=').map(split).filter(|(old, _)| !old.is_empty()).collect()
    }
}

impl std::fmt::Display for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Mapping {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wish = Self(text.to_owned());
        if wish.splits().is_empty() {
            Err(format!("'{text}' is not of the form OLD=NEW"))
        } else {
            Ok(wish)
        }
    }
}

/// The command line as it will be, with the disks where they will be. Layers are named as the
/// original has them.
pub struct Planned {
    options: Vec<QemuOption>,
    dir: PathBuf,
    /// Old value and new: what was mapped, and what was moved into the VM's directory.
    renamed: Vec<(String, String)>,
}

impl Planned {
    /// Rewrites the command line of the checkpoint.
    ///
    /// # Errors
    /// Damaged when it is none; refused when it names something of another host that `wishes` do
    /// not replace or allow.
    pub fn of(places: &Places<'_>, wishes: &Wishes) -> Result<Self, EngineError> {
        Self::rewrite(places, wishes).in_phase(Phase::Plan)
    }

    fn rewrite(places: &Places<'_>, wishes: &Wishes) -> Result<Self> {
        let manifest = places.manifest;
        let words = &manifest.vm_record.arguments;
        let mut paths = NewPaths::new(Path::new(&manifest.vm_record.directory));
        manifest
            .disks
            .iter()
            .flat_map(|disk| &disk.backing)
            .for_each(|layer| paths.add_layer(&layer.path, Path::new(&layer.path)));
        manifest
            .vm_record
            .files
            .iter()
            .for_each(|layer| paths.add_boot_file(&layer.path, Path::new(&layer.path)));
        manifest.disks.iter().for_each(|disk| paths.add_disk(&disk.file, &places.image(disk)));
        let options = match saved::restored(words, &paths, wishes) {
            Ok(restored) => restored.options,
            Err(error) => return Err(with_taken(error.into(), words, wishes)),
        };
        Ok(Self { options, dir: places.dir.to_owned(), renamed: renamed(words, wishes)? })
    }

    /// The files and sockets that QEMU makes: in the VM's directory, or where the user wants them.
    /// What is there already is a terminal or a pipe, once nothing is replaced.
    pub(crate) fn made(&self) -> Vec<PathBuf> {
        let mut made = Vec::new();
        visit(&self.options, |site| {
            let path = self.dir.join(site.value);
            if matches!(site.means, Use::Output | Use::Listen)
                && !path.exists()
                && !made.contains(&path)
            {
                made.push(path);
            }
        });
        made
    }

    /// Refuses what would take something away: a file or socket that exists, a port or tap in use.
    pub(crate) fn check_free(&self) -> Result<()> {
        let mut taken = Vec::new();
        visit(&self.options, |site| {
            let path = self.dir.join(site.value);
            if matches!(site.means, Use::Output | Use::Listen) && is_replaced(&path) {
                // Whether it is in use is not tried: the guest could notice a client of its serial
                // port.
                let (path, old) = (path.display(), saved_value(&self.renamed, site.value));
                taken.push(format!(
                    "{path} (-{}) exists already: use --map {old}={old}-2 or another --dir, or remove it if nothing uses it",
                    site.option
                ));
            }
        });
        taken.extend(ports::taken(&self.options, &|value| saved_value(&self.renamed, value)));
        taken.dedup();
        if taken.is_empty() {
            Ok(())
        } else {
            Err(refused(format!("nothing was made, because {}", taken.join("; "))))
        }
    }

    /// What the user of a copy should know of the network that it shares with its original.
    pub(crate) fn note_of_copy(&self) -> String {
        let is_shared = |option: &QemuOption| {
            matches!(option.name.as_str(), "netdev" | "nic" | "net")
                && Form::of(option)
                    .get("type")
                    .is_some_and(|kind| SHARED_NETWORKS.contains(&kind.as_str()))
        };
        let shared = "a copy has the original's MAC and IP addresses, machine-id and random state (docs/copies.md)";
        match self.options.iter().any(is_shared) {
            true => format!(
                "{shared}; its network may be the original's: while that one runs, they must not be in one network"
            ),
            false => shared.to_owned(),
        }
    }
}

/// Whether QEMU would empty or remove what is there. A terminal, a pipe or /dev/null is there to be
/// written to.
fn is_replaced(path: &Path) -> bool {
    let Ok(facts) = path.symlink_metadata() else { return false };
    let kind = std::fs::metadata(path).unwrap_or(facts).file_type();
    kind.is_file() || kind.is_socket() || kind.is_symlink()
}

/// What must be named at all is named best with a port that is free.
fn with_taken(error: Error, words: &[String], wishes: &Wishes) -> Error {
    let Ok(options) = arguments::parse(words) else { return error };
    let mapped = restorable::map(options, wishes);
    let taken = ports::taken(&mapped.options, &|value| saved_value(&wishes.map, value));
    if taken.is_empty() {
        error
    } else {
        refused(format!("{}; and {}", explain(&error), taken.join("; ")))
    }
}

/// What `--map` takes for a value of the new line.
fn saved_value(renamed: &[(String, String)], new: &str) -> String {
    let hit = renamed.iter().find(|(_, renamed)| renamed == new);
    hit.map_or_else(|| new.to_owned(), |(old, _)| old.clone())
}

fn renamed(words: &[String], wishes: &Wishes) -> Result<Vec<(String, String)>> {
    let mut renamed = wishes.map.clone();
    renamed.extend(restorable::map(arguments::parse(words)?, wishes).relocate(&wishes.allow));
    Ok(renamed)
}

/// A copy's guest has to notice that it is one: its random state and its tokens are the original's,
/// too.
pub(crate) fn as_copy(options: Vec<QemuOption>, wishes: &Wishes) -> Vec<QemuOption> {
    let is_wish = |value: &str| wishes.map.iter().any(|(_, new)| new == value);
    rewrite(options, |site| {
        let is_id = matches!(site.option, "device" | "global")
            && site.key == "guid"
            && !is_wish(site.value);
        is_id.then(|| "auto".to_owned())
    })
}

/// Splits each `OLD=NEW` where OLD is a value of the saved command line, which may hold `=` itself;
/// of several such OLDs the longest is meant.
pub(crate) fn resolve(words: &[String], map: &[Mapping]) -> Result<Vec<(String, String)>> {
    let options = arguments::parse(words)?;
    map.iter().map(|wish| resolve_one(&options, wish)).collect()
}

fn resolve_one(options: &[QemuOption], wish: &Mapping) -> Result<(String, String)> {
    let splits = wish.splits();
    let unused =
        restorable::map(options.to_vec(), &Wishes { map: splits.clone(), ..Wishes::default() })
            .unused;
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
        if site.means != Use::Plain
            && !site.value.is_empty()
            && !found.iter().any(|known| known == site.value)
        {
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

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::net::UnixListener;
    use vm::error::{Class, class_of};

    fn saved_line(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    fn wishes(line: &str, map: &[&str]) -> Result<Wishes> {
        let map: Vec<Mapping> = map.iter().map(|text| text.parse().unwrap()).collect();
        Ok(Wishes { map: resolve(&saved_line(line), &map)?, ..Wishes::default() })
    }

    fn planned(line: &str, map: &[&str], dir: &Path) -> Planned {
        let (words, wishes) = (saved_line(line), wishes(line, map).unwrap());
        let options = saved::restored(&words, &NewPaths::new(dir), &wishes).unwrap().options;
        Planned { options, dir: dir.to_owned(), renamed: renamed(&words, &wishes).unwrap() }
    }

    #[test]
    fn copy_makes_nothing_outside_its_directory() {
        let line = "-qmp unix:/run/a/q.sock,server=on,wait=off -serial file:/var/log/s.log -vnc unix:/run/b/q.sock \
                    -chardev socket,id=c,path=/run/c.sock,server=on,wait=off,logfile=/var/log/c.log";
        let made = planned(line, &[], Path::new("/d")).made();
        assert_eq!(
            made,
            ["q.sock", "s.log", "q.sock.2", "c.sock", "c.log"]
                .map(|name| Path::new("/d").join(name))
        );
    }

    #[test]
    fn map_is_split_where_a_saved_value_ends() {
        let line = "-spice port=5930,disable-ticketing=on -netdev user,id=n,hostfwd=tcp::1-:22";
        let split = |map: &str| wishes(line, &[map]).map(|wishes| wishes.map[0].clone());
        let pair = |old: &str, new: &str| (old.to_owned(), new.to_owned());
        assert_eq!(
            split("port=5930,disable-ticketing=on=port=5931,disable-ticketing=on").unwrap(),
            pair("port=5930,disable-ticketing=on", "port=5931,disable-ticketing=on")
        );
        assert_eq!(split("tcp::1-:22=tcp::2-:22").unwrap(), pair("tcp::1-:22", "tcp::2-:22"));
        let error = split("nothing=x").unwrap_err();
        assert_eq!(class_of(&error), Class::Refused);
        assert!(error.to_string().contains("tcp::1-:22"), "{error}");
        assert!("x".parse::<Mapping>().is_err() && "=x".parse::<Mapping>().is_err());
    }

    #[test]
    fn copy_gets_a_new_generation_id() {
        let copy = |line: &str| {
            let options = as_copy(arguments::parse(&saved_line(line)).unwrap(), &Wishes::default());
            arguments::words(&options).join(" ")
        };
        assert_eq!(
            copy("-device vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87,id=g"),
            "-device vmgenid,guid=auto,id=g"
        );
        assert_eq!(
            copy("-global vmgenid.guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"),
            "-global vmgenid.guid=auto"
        );
        assert!(
            copy(r#"-device {"driver":"vmgenid","guid":"324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"}"#)
                .contains(r#""guid":"auto""#)
        );
    }

    #[test]
    fn copy_replaces_no_file_and_no_socket() {
        let place = tempfile::tempdir().unwrap();
        let line = "-serial file:/var/log/s.log -chardev socket,id=q,path=q.sock,server=on,wait=off -D /dev/null";
        planned(line, &[], place.path()).check_free().unwrap();
        let _listener = UnixListener::bind(place.path().join("q.sock")).unwrap();
        let error = planned(line, &[], place.path()).check_free().unwrap_err();
        assert!(
            class_of(&error) == Class::Refused && error.to_string().contains("--map q.sock="),
            "{error}"
        );
        planned(line, &["q.sock=p.sock"], place.path()).check_free().unwrap();
        std::os::unix::fs::symlink("nowhere", place.path().join("s.log")).unwrap();
        let error = planned(line, &["q.sock=p.sock"], place.path()).check_free().unwrap_err();
        assert!(error.to_string().contains("--map /var/log/s.log="), "{error}");
        // A path that the user names is not moved, and is replaced as little.
        let named = place.path().join("q.sock").display().to_string();
        let line = "-chardev socket,id=q,path=/run/x.sock,server=on,wait=off";
        let other = tempfile::tempdir().unwrap();
        let error = planned(line, &[&format!("/run/x.sock={named}")], other.path())
            .check_free()
            .unwrap_err();
        assert!(error.to_string().contains("--map /run/x.sock="), "{error}");
    }

    /// A display that must be named, and whose port the original has.
    #[test]
    fn copy_gets_all_refusals_in_one_message() {
        let holder = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let display = holder.local_addr().unwrap().port() - 5900;
        let line = saved_line(&format!("-vnc :{display} -monitor vc"));
        let error = saved::restored(&line, &NewPaths::new(Path::new("/vm")), &Wishes::default())
            .err()
            .unwrap();
        let error = with_taken(error.into(), &line, &Wishes::default());
        assert!(
            class_of(&error) == Class::Refused
                && error.to_string().contains(&format!("use --map :{display}=:")),
            "{error}"
        );
    }

    #[test]
    fn copy_in_a_shared_network_gets_a_note() {
        let note = |line: &str| {
            planned(line, &[], Path::new("/d")).note_of_copy().contains("in one network")
        };
        assert!(
            note("-netdev tap,id=n,ifname=tap0,script=no,downscript=no")
                && note("-netdev socket,id=n,mcast=230.0.0.1:1234")
        );
        assert!(!note("-netdev user,id=n -device e1000,netdev=n"));
    }
}
