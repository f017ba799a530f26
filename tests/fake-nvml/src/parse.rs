//! The syntax of scenario files: text in, [`Machine`] or the first error out. Pure; it must not read files.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::MAX_GPUS;
use crate::abi::Code;
use crate::pci::Pci;
use crate::scenario::{Feature, Gpu, Link, Lost, Machine, Process, level};

/// Most NVLinks of one GPU: `NVML_NVLINK_MAX_LINKS`.
pub(crate) const MAX_LINKS: u32 = 18;

/// Most logical CPUs that `cpus` may name; the kernel's own limit on common builds.
const MAX_CPUS: u32 = 8192;

/// What is wrong with a scenario, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScenarioError {
    line: usize,
    problem: String,
}

impl fmt::Display for ScenarioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.problem)
    }
}

impl std::error::Error for ScenarioError {}

/// Checks a scenario; gives its number of GPUs.
///
/// A scenario is a text of lines. Words are separated by blanks, `"…"` makes one word of several, `#` starts a comment.
/// Several `gpu` lines of one index add up, the later one wins.
///
/// ```text
/// driver 550.54.15            driver version
/// nvml 12.550.54.15           version of the NVML library
/// cuda 12040                  CUDA version of the driver
/// init_error NAME             nvmlInit answers NVML_ERROR_<NAME>
/// gpu I KEY VALUE …           facts of GPU I, from 0 without gaps; `gpu I` alone takes defaults for all
///   name uuid serial minor memory_mib reserved_mib used_mib pci pci_id util memory_util temp power_mw power_limit_mw
///   numa cpus(0-31,64) cuda_capability(9.0) architecture(hopper…) brand(nvidia|tesla|geforce) nvlinks(count up)
///   ecc(on|off|none) mig(on|off|none) ecc_corrected ecc_uncorrected remapped_corrected remapped_uncorrected
///   remapped_pending(0|1) remapped_failed(0|1)
/// gpu I lost                  no call on it succeeds: NVML_ERROR_GPU_IS_LOST, its handle included
/// gpu I lost_attached         the same, but handle, index, minor, name, uuid and PCI address can still be read
/// gpu I present               takes an earlier `lost` back
/// process I pid P memory_mib M
/// nvlink I L down | to J      link L of GPU I is down, or leads to GPU J (otherwise to a switch)
/// topology I J LEVEL          internal, single, multiple, hostbridge, node or system; default from numa
/// xid I CODE                  a critical error, delivered once to each event set that waits for it
/// fail I FUNCTION NAME        that function of NVML answers NVML_ERROR_<NAME> for GPU I
/// fail any FUNCTION NAME      the same, whatever it is asked about
/// ```
///
/// # Errors
/// The first line that is wrong.
pub fn check(text: &str) -> Result<usize, ScenarioError> {
    parse(text).map(|machine| machine.gpus.len())
}

/// Reads a scenario.
pub(crate) fn parse(text: &str) -> Result<Machine, ScenarioError> {
    let mut reader = Reader {
        machine: Machine {
            driver: "550.54.15".to_owned(),
            nvml: "12.550.54.15".to_owned(),
            ..Machine::empty()
        },
        gpus: BTreeMap::new(),
    };
    let mut lines = 0;
    for (index, line) in text.lines().enumerate() {
        lines = index + 1;
        let read = words(line).and_then(|words| reader.line(&words));
        read.map_err(|problem| ScenarioError {
            line: index + 1,
            problem,
        })?;
    }
    reader.finish().map_err(|problem| ScenarioError {
        line: lines,
        problem,
    })
}

/// Splits a line into words.
fn words(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut rest = line.trim_start();
    while !rest.is_empty() && !rest.starts_with('#') {
        let word;
        if let Some(quoted) = rest.strip_prefix('"') {
            (word, rest) = quoted.split_once('"').ok_or("a quote is not closed")?;
        } else {
            let end = rest
                .find(|c: char| c.is_whitespace() || c == '"')
                .unwrap_or(rest.len());
            (word, rest) = rest.split_at(end);
        }
        words.push(word.to_owned());
        rest = rest.trim_start();
    }
    Ok(words)
}

struct Reader {
    machine: Machine,
    gpus: BTreeMap<u32, Gpu>,
}

impl Reader {
    fn line(&mut self, words: &[String]) -> Result<(), String> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words.as_slice() {
            [] => {}
            ["driver", version] => self.machine.driver = (*version).to_owned(),
            ["nvml", version] => self.machine.nvml = (*version).to_owned(),
            ["cuda", version] => self.machine.cuda = number("cuda", version)?,
            ["init_error", name] => self.machine.init_error = Some(error_code(name)?),
            ["gpu", index, facts @ ..] => return self.gpu_line(index, facts),
            ["process", index, "pid", pid, "memory_mib", memory] => {
                let process = Process {
                    pid: number("pid", pid)?,
                    memory_mib: number("memory_mib", memory)?,
                };
                self.gpu(index)?.processes.push(process);
            }
            ["nvlink", index, link, "down"] => {
                let link = limited("nvlink", link, MAX_LINKS - 1)?;
                self.gpu(index)?.links.insert(
                    link,
                    Link {
                        up: false,
                        peer: None,
                    },
                );
            }
            ["nvlink", index, link, "to", peer] => {
                let link = limited("nvlink", link, MAX_LINKS - 1)?;
                let peer = Some(self.gpu(peer)?.index);
                self.gpu(index)?.links.insert(link, Link { up: true, peer });
            }
            ["topology", one, other, closeness] => {
                let (one, other) = (self.gpu(one)?.index, self.gpu(other)?.index);
                let closeness = choice("topology", closeness, LEVELS)?;
                self.machine
                    .topology
                    .insert((one.min(other), one.max(other)), closeness);
            }
            ["xid", index, code] => {
                let event = (self.gpu(index)?.index, number("xid", code)?);
                self.machine.xids.push(event);
            }
            ["fail", "any", function, name] => {
                let code = error_code(name)?;
                self.machine.failures.insert((*function).to_owned(), code);
            }
            ["fail", index, function, name] => {
                let code = error_code(name)?;
                self.gpu(index)?
                    .failures
                    .insert((*function).to_owned(), code);
            }
            [word, ..] => return Err(format!("unknown or incomplete statement {word:?}")),
        }
        Ok(())
    }

    fn gpu_line(&mut self, index: &str, mut facts: &[&str]) -> Result<(), String> {
        let index = limited("gpu", index, MAX_GPUS - 1)?;
        let gpu = self.gpus.entry(index).or_insert_with(|| Gpu::new(index));
        loop {
            facts = match facts {
                [] => return Ok(()),
                ["lost", rest @ ..] => {
                    gpu.lost = Lost::Fully;
                    rest
                }
                ["lost_attached", rest @ ..] => {
                    gpu.lost = Lost::Attached;
                    rest
                }
                ["present", rest @ ..] => {
                    gpu.lost = Lost::No;
                    rest
                }
                [key, value, rest @ ..] => {
                    set(gpu, key, value)?;
                    rest
                }
                [key] => return Err(format!("{key:?} of a gpu has no value or is unknown")),
            };
        }
    }

    /// The GPU that a line refers to; it must have been introduced before.
    fn gpu(&mut self, index: &str) -> Result<&mut Gpu, String> {
        let known = index
            .parse()
            .ok()
            .and_then(|index: u32| self.gpus.get_mut(&index));
        known.ok_or_else(|| format!("no gpu {index:?} on the lines before"))
    }

    fn finish(mut self) -> Result<Machine, String> {
        for (expected, index) in (0u32..).zip(self.gpus.keys()) {
            if *index != expected {
                return Err(format!("there is a gpu {index} but no gpu {expected}"));
            }
        }
        self.machine.gpus = self.gpus.into_values().collect();
        Ok(self.machine)
    }
}

/// Sets the fact `key` of a GPU.
fn set(gpu: &mut Gpu, key: &str, value: &str) -> Result<(), String> {
    match key {
        "name" => gpu.name = value.to_owned(),
        "uuid" => gpu.uuid = value.to_owned(),
        "serial" => gpu.serial = value.to_owned(),
        "minor" => gpu.minor = number(key, value)?,
        "memory_mib" => gpu.memory_mib = number(key, value)?,
        "reserved_mib" => gpu.reserved_mib = number(key, value)?,
        "used_mib" => gpu.used_mib = number(key, value)?,
        "pci" => gpu.pci = Pci::parse(value).ok_or_else(|| bad(key, value))?,
        "pci_id" => gpu.pci_id = u32::from_str_radix(value, 16).map_err(|_| bad(key, value))?,
        "util" => gpu.util = limited(key, value, 100)?,
        "memory_util" => gpu.memory_util = limited(key, value, 100)?,
        "temp" => gpu.temp = number(key, value)?,
        "power_mw" => gpu.power_mw = number(key, value)?,
        "power_limit_mw" => gpu.power_limit_mw = number(key, value)?,
        "numa" => gpu.numa = Some(limited(key, value, u64::BITS - 1)?),
        "cpus" => gpu.cpus = cpu_list(value).ok_or_else(|| bad(key, value))?,
        "cuda_capability" => {
            let (major, minor) = value.split_once('.').ok_or_else(|| bad(key, value))?;
            gpu.cuda_capability = (limited(key, major, 999)?, limited(key, minor, 999)?);
        }
        "architecture" => gpu.architecture = choice(key, value, ARCHITECTURES)?,
        "brand" => gpu.brand = choice(key, value, BRANDS)?,
        "nvlinks" => {
            let up = Link {
                up: true,
                peer: None,
            };
            gpu.links = (0..limited(key, value, MAX_LINKS)?)
                .map(|link| (link, up))
                .collect();
        }
        "ecc" => gpu.ecc = choice(key, value, FEATURES)?,
        "mig" => gpu.mig = choice(key, value, FEATURES)?,
        "ecc_corrected" => gpu.ecc_corrected = number(key, value)?,
        "ecc_uncorrected" => gpu.ecc_uncorrected = number(key, value)?,
        "remapped_corrected" => gpu.remapped.corrected = number(key, value)?,
        "remapped_uncorrected" => gpu.remapped.uncorrected = number(key, value)?,
        "remapped_pending" => gpu.remapped.pending = limited(key, value, 1)? == 1,
        "remapped_failed" => gpu.remapped.failed = limited(key, value, 1)? == 1,
        _ => return Err(format!("unknown key {key:?} of a gpu")),
    }
    Ok(())
}

const LEVELS: &[(&str, u32)] = &[
    ("internal", level::INTERNAL),
    ("single", level::SINGLE),
    ("multiple", level::MULTIPLE),
    ("hostbridge", level::HOSTBRIDGE),
    ("node", level::NODE),
    ("system", level::SYSTEM),
];

/// `NVML_DEVICE_ARCH_…`.
const ARCHITECTURES: &[(&str, u32)] = &[
    ("pascal", 4),
    ("volta", 5),
    ("turing", 6),
    ("ampere", 7),
    ("ada", 8),
    ("hopper", 9),
    ("blackwell", 10),
];

/// `NVML_BRAND_…`.
const BRANDS: &[(&str, u32)] = &[("tesla", 2), ("geforce", 5), ("nvidia", 14)];

const FEATURES: &[(&str, Feature)] = &[
    ("none", Feature::None),
    ("off", Feature::Off),
    ("on", Feature::On),
];

fn bad(key: &str, value: &str) -> String {
    format!("bad value {value:?} of {key:?}")
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| bad(key, value))
}

fn limited(key: &str, value: &str, most: u32) -> Result<u32, String> {
    let number: u32 = number(key, value)?;
    if number > most {
        return Err(format!("{number} of {key:?} is above {most}"));
    }
    Ok(number)
}

fn choice<T: Copy>(key: &str, value: &str, choices: &[(&str, T)]) -> Result<T, String> {
    let found = choices.iter().find(|(name, _)| *name == value);
    found.map(|(_, meaning)| *meaning).ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        format!("{}; choices are {}", bad(key, value), names.join(", "))
    })
}

fn error_code(name: &str) -> Result<Code, String> {
    Code::from_name(name).ok_or_else(|| format!("no error of NVML is called {name:?}"))
}

/// Reads a list such as `0-3,8`.
fn cpu_list(text: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MAX_CPUS {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_whole_scenario() {
        let machine = parse(
            "# two GPUs\n\
             driver 535.1\ncuda 12020\n\n\
             gpu 0 name \"NVIDIA H100 80GB HBM3\" uuid GPU-0 memory_mib 81559 pci 0000:18:00.0 numa 0 cpus 0-2,8\n\
             gpu 1 nvlinks 2 ecc none lost_attached # gone\n\
             gpu 0 util 93\n\
             process 0 pid 1234 memory_mib 512\n\
             nvlink 1 1 down\nnvlink 0 3 to 1\n\
             topology 1 0 single\n\
             xid 1 79\n\
             fail 0 nvmlDeviceGetTemperature NOT_SUPPORTED\n",
        )
        .unwrap();
        assert_eq!(machine.driver, "535.1");
        assert_eq!(machine.cuda, 12_020);
        let [first, second] = machine.gpus.as_slice() else {
            panic!("two gpus")
        };
        assert_eq!(first.name, "NVIDIA H100 80GB HBM3");
        assert_eq!((first.util, first.numa), (93, Some(0)));
        assert_eq!(first.cpus, [0, 1, 2, 8]);
        assert_eq!(
            first.processes,
            [Process {
                pid: 1234,
                memory_mib: 512
            }]
        );
        assert_eq!(
            first.links[&3],
            Link {
                up: true,
                peer: Some(1)
            }
        );
        assert_eq!(
            first.answers("nvmlDeviceGetTemperature"),
            Err(Code::NOT_SUPPORTED)
        );
        assert_eq!(first.answers("nvmlDeviceGetName"), Ok(()));
        assert_eq!(second.ecc, Feature::None);
        assert_eq!(second.answers("nvmlDeviceGetUUID"), Ok(()));
        assert_eq!(
            second.answers("nvmlDeviceGetTemperature"),
            Err(Code::GPU_IS_LOST)
        );
        assert!(second.links[&0].up && !second.links[&1].up);
        assert_eq!(machine.ancestor(first, second), level::SINGLE);
        assert_eq!(machine.xids, [(1, 79)]);
    }

    #[test]
    fn an_empty_text_is_a_machine_without_gpus() {
        assert_eq!(check(""), Ok(0));
    }

    #[test]
    fn errors_name_the_line_and_the_word() {
        for (text, expected) in [
            ("gpu 0\ngpu 0 tmp 3", "line 2: unknown key \"tmp\""),
            ("gpu 0 temp", "line 1: \"temp\" of a gpu has no value"),
            ("gpu 0 util 101", "above 100"),
            ("gpu 64", "above 63"),
            ("gpu 1", "no gpu 0"),
            ("process 0 pid 1 memory_mib 1", "no gpu \"0\""),
            ("gpu 0 name \"x", "quote is not closed"),
            ("gpu 0 ecc maybe", "choices are none, off, on"),
            ("gpu 0\nfail 0 nvmlDeviceGetName OOPS", "no error of NVML"),
            ("gpu 0 cpus 0-99999999", "bad value"),
            ("driver", "unknown or incomplete statement"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?} gave {error:?}");
        }
    }
}
