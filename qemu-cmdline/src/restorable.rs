//! What a saved command line may do on the host that restores it.
//!
//! A user who can write the store chooses that command line. So QEMU opens nothing of the host that
//! the checkpoint does not bring along, executes nothing, and makes nothing outside of the restored
//! VM's directory, unless the user who restores names it. The same check is made before a
//! checkpoint is called durable, so that what cannot be restored at all is found while the VM still
//! runs.

use crate::arguments::{KeyList, QemuOption};
use crate::form::Form;
use crate::sites::{Site, monitor_chardevs, rewrite, visit};
use crate::table::unsupported::OTHER_USER;
use crate::table::{self, Use};
use std::collections::{HashMap, HashSet};
use std::fmt;

/// One value that stands in the way of a restore.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Finding {
    /// The option's name, without a dash.
    pub option: String,
    /// The dotted key, empty where the option has none.
    pub key: String,
    /// The value that stands in the way.
    pub value: String,
    /// Why it does.
    pub problem: Problem,
}

/// Why a value stands in the way of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Problem {
    /// A file that the checkpoint would have to hold, and does not: no restore can bring it.
    NotCarried,
    /// What the table does not know.
    Unknown,
    /// Something of the host that only its user may hand over.
    Host(Use),
}

impl Finding {
    fn new(option: &str, key: &str, value: &str, problem: Problem) -> Self {
        Self { option: option.to_owned(), key: key.to_owned(), value: value.to_owned(), problem }
    }

    /// Whether no option of `restore` helps.
    pub fn is_fatal(&self) -> bool {
        matches!(self.problem, Problem::NotCarried | Problem::Unknown | Problem::Host(Use::User))
    }

    /// What `restore --allow` takes for it.
    pub fn allowance(&self) -> String {
        let equals = if self.value.is_empty() { String::new() } else { format!("={}", self.value) };
        format!("{}{equals}", self.place())
    }

    fn place(&self) -> String {
        if self.key.is_empty() {
            self.option.clone()
        } else {
            format!("{}.{}", self.option, self.key)
        }
    }

    /// Whether the user's `--allow TEXT` is about it: the place alone, or the place and this very
    /// value.
    fn is_allowed_by(&self, text: &str) -> bool {
        self.problem != Problem::Host(Use::User) && self.is_named_by(text)
    }

    fn is_named_by(&self, text: &str) -> bool {
        text == self.place() || text == self.allowance()
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let equals = if self.key.is_empty() { String::new() } else { format!("{}=", self.key) };
        write!(f, "-{} {equals}{} {}", self.option, self.value, reason(self.problem))?;
        if self.problem == Problem::Host(Use::User) { write!(f, ": {OTHER_USER}") } else { Ok(()) }
    }
}

fn reason(problem: Problem) -> &'static str {
    match problem {
        Problem::NotCarried => "is a file that no checkpoint holds",
        Problem::Unknown => {
            "is not in Stillpoint's table of QEMU's options, and could be a file of this host"
        }
        Problem::Host(means) => match means {
            Use::Program => "is a program that QEMU would run",
            Use::Code => "is code that QEMU would load",
            Use::Control => "lets others command QEMU over the network",
            Use::Display => "shows the display, and with it QEMU's monitor, to the network",
            Use::Directory | Use::DataDirectory => "is a directory of the host",
            Use::HostFile => "is a file of the host that no checkpoint holds",
            Use::HostDevice => "is a device of the host",
            Use::Connect => "is another process of the host",
            Use::Process => "is about the old process",
            Use::User => "would make QEMU another user",
            Use::Never => "is nothing that a checkpoint saves",
            _ => "is something of the host",
        },
    }
}

/// Which of the files on a command line a checkpoint brings.
pub struct Carried<'a> {
    /// Whether a path is the image of a disk of the checkpoint.
    pub is_disk: &'a dyn Fn(&str) -> bool,
    /// Whether a path is a boot file of the checkpoint.
    pub is_boot_file: &'a dyn Fn(&str) -> bool,
    /// Whether a name without a slash is a file that comes with QEMU.
    pub is_qemus_own: &'a dyn Fn(&str) -> bool,
}

/// Everything that stands in the way, in the order of the command line.
pub fn check(options: &[QemuOption], carried: &Carried<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    let has_console = has_console_monitor(options);
    visit(options, |site| {
        // A display alone shows the guest.
        if site.means == Use::Display && !has_console {
            return;
        }
        if let Some(problem) = problem(site, carried) {
            found.push(Finding::new(site.option, site.key, site.value, problem));
        }
    });
    let unspoken = options.iter().filter_map(unspoken);
    found.extend(
        unspoken.filter(|finding| has_console || finding.problem != Problem::Host(Use::Display)),
    );
    found
}

/// Whether a user of the display could command QEMU by a monitor. QEMU makes its default monitor on
/// the display, but not when it has Stillpoint's monitor.
fn has_console_monitor(options: &[QemuOption]) -> bool {
    let is_console =
        |value: &str| value == "vc" || value.starts_with("vc:") || value.starts_with("vc,");
    let consoles: Vec<String> = options
        .iter()
        .filter(|option| option.name == "chardev")
        .map(Form::of)
        .filter(|form| {
            form.get("backend").or_else(|| form.get("backend.type")).as_deref() == Some("vc")
        })
        .filter_map(|form| form.get("id"))
        .collect();
    let monitors = monitor_chardevs(options);
    let is_direct = |option: &QemuOption| match table::syntax(&option.name) {
        Some(table::Syntax::Chardev { monitor }) => match option.value().strip_prefix("mon:") {
            Some(rest) => is_console(rest),
            None => monitor && is_console(option.value()),
        },
        _ => false,
    };
    consoles.iter().any(|id| monitors.contains(id)) || options.iter().any(is_direct)
}

fn problem(site: &Site<'_>, carried: &Carried<'_>) -> Option<Problem> {
    let not_carried = |is_carried: bool| (!is_carried).then_some(Problem::NotCarried);
    match site.means {
        Use::Plain | Use::Address | Use::Tap => None,
        Use::Disk => not_carried(site.value.is_empty() || (carried.is_disk)(site.value)),
        Use::Boot => not_carried((carried.is_boot_file)(site.value)),
        Use::Firmware => {
            let is_own = !site.value.contains('/') && (carried.is_qemus_own)(site.value);
            not_carried((carried.is_boot_file)(site.value) || is_own)
        }
        // Made in the restored VM's directory, to which a plain name belongs.
        Use::Output | Use::Listen => {
            (site.value.contains('/') || site.value == "..").then_some(Problem::Host(site.means))
        }
        Use::Unknown => may_be_path(site.value).then_some(Problem::Unknown),
        means => Some(Problem::Host(means)),
    }
}

/// Whether a value of an unknown place could lead to a file. A name without a slash could too, but
/// QEMU reads most of its words so; what is a file there is in the table.
fn may_be_path(value: &str) -> bool {
    let path = value.strip_prefix("file:").unwrap_or(value);
    path.contains('/') || path == ".."
}

/// What QEMU does where nothing is said.
fn unspoken(option: &QemuOption) -> Option<Finding> {
    // Whether it takes a value is not known either, so neither is what follows it.
    if table::syntax(&option.name).is_none() {
        return Some(Finding::new(&option.name, "", option.value(), Problem::Unknown));
    }
    let form = Form::of(option);
    let host = |key: &str, value: &str, means| {
        Some(Finding::new(&option.name, key, value, Problem::Host(means)))
    };
    match option.name.as_str() {
        "netdev" | "nic" | "net" if form.get("type").as_deref() == Some("tap") => {
            let has = |key: &str| form.has(key);
            let runs_default =
                !has("script") && !has("helper") && !has("br") && !has("fd") && !has("fds");
            if runs_default { host("script", "/etc/qemu-ifup", Use::Program) } else { None }
        }
        "object" => {
            let kind = form.get("qom-type").unwrap_or_default();
            if table::is_known_object(&kind) {
                None
            } else {
                Some(Finding::new("object", "qom-type", &kind, Problem::Host(Use::Unknown)))
            }
        }
        "spice" => {
            let is_served = ["port", "tls-port"]
                .iter()
                .any(|key| form.get(key).is_some_and(|port| port != "0"));
            if is_served && !form.has("addr") {
                host("port", &form.get("port").unwrap_or_default(), Use::Display)
            } else {
                None
            }
        }
        _ => None,
    }
}

/// What the user of a restore hands over.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// `--map OLD=NEW`.
    pub map: Vec<(String, String)>,
    /// `--allow WHAT`.
    pub allow: Vec<String>,
}

/// A command line with the user's own values.
#[derive(Debug, Default)]
pub struct Mapped {
    /// The options with those values.
    pub options: Vec<QemuOption>,
    /// Option and new value: what the user named.
    named: HashSet<(String, String)>,
    /// OLDs that no value was.
    pub unused: Vec<String>,
}

/// Replaces each whole value that is an OLD: of any option or key, whatever it means.
pub fn map(options: Vec<QemuOption>, wishes: &Wishes) -> Mapped {
    let news: HashMap<&str, &str> =
        wishes.map.iter().map(|(old, new)| (old.as_str(), new.as_str())).collect();
    let mut used: HashSet<String> = HashSet::new();
    let mut mapped = Mapped::default();
    let mut change = |option: &str, old: &str| {
        let new = (*news.get(old)?).to_owned();
        used.insert(old.to_owned());
        mapped.named.insert((option.to_owned(), new.clone()));
        Some(new)
    };
    let wholes = options.into_iter().map(|option| {
        let value = whole(&option, &mut change);
        value.map_or_else(|| option.clone(), |value| QemuOption::with(&option.name, value))
    });
    let options: Vec<QemuOption> = wholes.collect();
    // What has just been mapped is not an OLD again.
    let fresh: HashSet<(String, String)> = mapped.named.clone();
    let mut change = |option: &str, old: &str| {
        if fresh.contains(&(option.to_owned(), old.to_owned())) {
            return None;
        }
        let new = (*news.get(old)?).to_owned();
        used.insert(old.to_owned());
        mapped.named.insert((option.to_owned(), new.clone()));
        Some(new)
    };
    mapped.options = rewrite(options, |site| change(site.option, site.value));
    mapped.unused =
        wishes.map.iter().map(|(old, _)| old.clone()).filter(|old| !used.contains(old)).collect();
    mapped
}

/// The value of an option as a whole, or a first word with its scheme (`unix:/run/x.sock`).
fn whole(
    option: &QemuOption,
    change: &mut impl FnMut(&str, &str) -> Option<String>,
) -> Option<String> {
    let value = option.value.as_deref()?;
    if let Some(new) = change(&option.name, value) {
        return Some(new);
    }
    if value.starts_with('{') {
        return None;
    }
    let mut keys = KeyList::parse(value);
    let has_scheme = |text: &str| {
        ["unix:", "file:", "pipe:", "tcp:", "mon:", "udp:", "telnet:"]
            .iter()
            .any(|scheme| text.starts_with(scheme))
    };
    let changed = keys.map_values(|index, key, text| {
        if index == 0 && key.is_none() && has_scheme(text) {
            change(&option.name, text)
        } else {
            None
        }
    });
    changed.then(|| keys.to_string())
}

impl Mapped {
    /// Replaces values that the user has not named.
    pub fn rewrite(&mut self, mut change: impl FnMut(&Site<'_>) -> Option<String>) {
        let options = std::mem::take(&mut self.options);
        self.options = rewrite(options, |site| {
            if self.is_named(site.option, site.value) { None } else { change(site) }
        });
    }

    /// What stands in the way and was neither mapped nor allowed; and allowances that nothing
    /// needed.
    pub fn check(&self, carried: &Carried<'_>, allow: &[String]) -> (Vec<Finding>, Vec<String>) {
        let found = check(&self.options, carried);
        let unused = allow
            .iter()
            .filter(|text| !found.iter().any(|finding| finding.is_named_by(text)))
            .cloned()
            .collect();
        let is_mapped = |finding: &Finding| {
            self.is_named(&finding.option, &finding.value)
                && finding.problem != Problem::Host(Use::User)
        };
        let is_open = |finding: &Finding| {
            !is_mapped(finding) && !allow.iter().any(|text| finding.is_allowed_by(text))
        };
        (found.into_iter().filter(is_open).collect(), unused)
    }

    fn is_named(&self, option: &str, value: &str) -> bool {
        let is_it = |(name, new): &(String, String)| {
            name == option
                && (new == value || new.split_once(':').is_some_and(|(_, rest)| rest == value))
        };
        self.named.iter().any(is_it)
    }

    /// Puts what QEMU makes into the restored VM's directory: each file and socket that the user
    /// has not named gets its bare name there. Returns old and new names.
    pub fn relocate(&mut self, allow: &[String]) -> Vec<(String, String)> {
        let mut new_names: HashMap<String, String> = HashMap::new();
        let mut taken = self.plain_names();
        let mut moved = Vec::new();
        self.rewrite(|site| {
            let finding =
                Finding::new(site.option, site.key, site.value, Problem::Host(site.means));
            let is_made = matches!(site.means, Use::Output | Use::Listen)
                && (site.value.contains('/') || site.value == "..");
            if !is_made || allow.iter().any(|text| finding.is_allowed_by(text)) {
                return None;
            }
            let new = new_names.entry(site.value.to_owned()).or_insert_with(|| {
                let new = free_name(site.value, &taken);
                taken.insert(new.clone());
                moved.push((site.value.to_owned(), new.clone()));
                new
            });
            Some(new.clone())
        });
        moved
    }

    /// Takes out where QEMU is to look for its own files: the restoring host's QEMU has its own.
    /// Returns what went.
    pub fn drop_data_directories(&mut self, allow: &[String]) -> Vec<String> {
        let mut gone = Vec::new();
        for option in std::mem::take(&mut self.options) {
            let finding =
                Finding::new(&option.name, "", option.value(), Problem::Host(Use::DataDirectory));
            let is_it =
                table::syntax(&option.name) == Some(table::Syntax::Text(Use::DataDirectory));
            if is_it
                && !self.is_named(&option.name, option.value())
                && !allow.iter().any(|text| finding.is_allowed_by(text))
            {
                gone.push(format!("-{} {}", option.name, option.value()));
            } else {
                self.options.push(option);
            }
        }
        gone
    }

    fn plain_names(&self) -> HashSet<String> {
        let mut names = HashSet::new();
        visit(&self.options, |site| {
            if matches!(site.means, Use::Output | Use::Listen) && !site.value.contains('/') {
                names.insert(site.value.to_owned());
            }
        });
        names
    }
}

/// The last part of a path; with a number where that is taken.
fn free_name(path: &str, taken: &HashSet<String>) -> String {
    let last = path.rsplit('/').find(|part| !part.is_empty()).unwrap_or("file");
    let base = if last.chars().all(|letter| letter == '.') { "file" } else { last };
    let names =
        std::iter::once(base.to_owned()).chain((2..).map(|number| format!("{base}.{number}")));
    names.into_iter().find(|name| !taken.contains(name)).unwrap_or_else(|| base.to_owned())
}

#[cfg(test)]
mod test;
