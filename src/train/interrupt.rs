//! Ctrl-C, SIGTERM and SIGHUP: the first asks the loop to save and stop, a second Ctrl-C or SIGTERM
//! exits at once.
//!
//! SIGHUP says that the terminal is gone. It may come twice, from the kernel and from the shell, so it
//! never ends the process at once; and a run that was started to outlive its terminal (`nohup`) does.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

/// What asked a run to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Ctrl-C.
    Interrupt,
    /// SIGTERM, as schedulers send it.
    Terminate,
    /// SIGHUP: the terminal was closed, or the connection to it lost.
    HangUp,
}

impl Signal {
    /// 128 + the signal's number, as shells report it.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
            Self::HangUp => 129,
        }
    }

    /// The signal with this exit code.
    pub(super) fn of_exit_code(code: usize) -> Option<Self> {
        let all = [Self::Interrupt, Self::Terminate, Self::HangUp];
        all.into_iter()
            .find(|signal| usize::from(signal.exit_code()) == code)
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interrupt => "Ctrl-C",
            Self::Terminate => "SIGTERM",
            Self::HangUp => "SIGHUP",
        })
    }
}

/// A flag that the loop looks at between steps.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    /// 0, or the number of the signal that came.
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// A flag that nothing but [`raise`](Self::raise) sets.
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on Ctrl-C and SIGTERM set the flag; a second one ends the process at once. On Linux
    /// SIGHUP sets it too, unless the process was started with SIGHUP ignored.
    ///
    /// # Errors
    /// The system refuses the handlers.
    pub fn listen(&self) -> std::io::Result<()> {
        // Order matters: the shutdown is armed by the first signal of either kind, for the second.
        let armed = Arc::new(AtomicBool::new(false));
        for (signal, kind) in [(SIGINT, Signal::Interrupt), (SIGTERM, Signal::Terminate)] {
            let code = i32::from(kind.exit_code());
            signal_hook::flag::register_conditional_shutdown(signal, code, armed.clone())?;
            signal_hook::flag::register(signal, armed.clone())?;
            let number = usize::from(kind.exit_code());
            signal_hook::flag::register_usize(signal, self.signal.clone(), number)?;
        }
        #[cfg(target_os = "linux")]
        if !hang_up_is_ignored() {
            use signal_hook::consts::SIGHUP;
            let number = usize::from(Signal::HangUp.exit_code());
            signal_hook::flag::register(SIGHUP, armed)?;
            signal_hook::flag::register_usize(SIGHUP, self.signal.clone(), number)?;
        }
        Ok(())
    }

    /// Asks for a stop.
    pub fn raise(&self, signal: Signal) {
        self.signal
            .store(usize::from(signal.exit_code()), Ordering::SeqCst);
    }

    /// What asked for a stop, if anything did.
    pub fn raised(&self) -> Option<Signal> {
        Signal::of_exit_code(self.signal.load(Ordering::SeqCst))
    }
}

/// Whether this process ignores SIGHUP, by the mask that proc(5) describes: bit n - 1 is signal n.
#[cfg(target_os = "linux")]
fn hang_up_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // Where nothing can be learned, the signal is left as it is.
    mask.is_none_or(|mask| mask >> (signal_hook::consts::SIGHUP - 1) & 1 == 1)
}
