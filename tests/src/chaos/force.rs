//! Carries a script of faults out, in its time, and heals everything at the end.

use std::fs::File;
use std::io::Write as _;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::net::HEAD;
use super::script::{Fault, Step};
use super::users::Users;
use super::world::{World, host_of};
use super::{rest, tell};

/// Plays the script; returns when `time` is over and all is healed.
pub(crate) fn play(world: &World, script: &[Step], time: Duration, users: &Users) {
    let began = Instant::now();
    let mut actions: Vec<(Duration, &Step, bool)> = Vec::new();
    for step in script {
        actions.push((step.at, step, true));
        if step.lasts > Duration::ZERO {
            actions.push((step.at + step.lasts, step, false));
        }
    }
    actions.sort_by_key(|(at, ..)| *at);
    for (at, step, begin) in actions {
        rest((began + at).saturating_duration_since(Instant::now()));
        if begin {
            tell(&step.to_string());
        }
        act(world, step.fault, begin, users);
    }
    rest((began + time).saturating_duration_since(Instant::now()));
    heal(world);
}

fn act(world: &World, fault: Fault, begin: bool, users: &Users) {
    let net = &world.net;
    let stop = if begin {
        Signal::SIGSTOP
    } else {
        Signal::SIGCONT
    };
    match fault {
        Fault::KillCoordinator { pause } => {
            world.coordinator.kill(pause);
            // Somebody always wants it just now.
            users.hurry();
        }
        Fault::KillAll { pause } => {
            world.daemons().for_each(|daemon| daemon.kill(pause));
            users.hurry();
        }
        Fault::StopCoordinator => world.coordinator.signal(stop),
        Fault::CutCoordinator => net.cable(HEAD, !begin),
        Fault::FullCoordinatorDisk => fill(world, None, begin),
        Fault::KillAgent { agent, pause } => world.agents[agent].kill(pause),
        Fault::KillShims { agent } => kill_shims(world, agent),
        Fault::StopAgent { agent } | Fault::LongStop { agent } => world.agents[agent].signal(stop),
        Fault::Cut { agent } | Fault::LongCut { agent } => net.cable(host_of(agent), !begin),
        Fault::Deaf { agent } => net.deaf(host_of(agent), HEAD, begin),
        Fault::Mute { agent } => net.deaf(HEAD, host_of(agent), begin),
        Fault::Peers { agent, other } => net.deaf(host_of(agent), host_of(other), begin),
        Fault::Loss { agent, percent } => net.loss(host_of(agent), percent, begin),
        Fault::Delay { by, .. } => {
            if let Some(proxy) = &world.proxy {
                proxy.delay(if begin { by } else { Duration::ZERO });
            }
        }
        Fault::FullDisk { agent } => fill(world, Some(agent), begin),
    }
}

/// Everything that a script may have left, whatever it was.
fn heal(world: &World) {
    world.net.heal();
    if let Some(proxy) = &world.proxy {
        proxy.delay(Duration::ZERO);
    }
    for daemon in world.daemons() {
        daemon.signal(Signal::SIGCONT);
    }
    fill(world, Some(world.stage.small_disk), false);
    fill(world, None, false);
}

/// Writes until nothing fits any more, or gives it all back.
fn fill(world: &World, agent: Option<usize>, begin: bool) {
    let path = world.filler(agent);
    if !begin {
        let _ = std::fs::remove_file(path);
        return;
    }
    let Ok(mut file) = File::create(&path) else {
        // Full already.
        return;
    };
    for piece in [1 << 20, 4096, 1] {
        let bytes = vec![b'x'; piece];
        while file.write_all(&bytes).is_ok() {}
    }
}

/// A supervisor has its agent's environment, and nothing else says whose it is.
fn kill_shims(world: &World, agent: usize) {
    let home = format!("HOME={}", world.home(world.agents[agent].name()).display());
    for process in world.others() {
        if process.is_shim() && process.has(&home) {
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
    }
}
