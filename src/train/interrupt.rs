//! Ctrl-C and SIGTERM: the first asks the loop to save and stop, the second exits at once.

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
}

impl Signal {
    /// 128 + the signal's number, as shells report it.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interrupt => "Ctrl-C",
            Self::Terminate => "SIGTERM",
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

    /// From now on Ctrl-C and SIGTERM set the flag; a second signal ends the process at once.
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
        Ok(())
    }

    /// Asks for a stop.
    pub fn raise(&self, signal: Signal) {
        self.signal
            .store(usize::from(signal.exit_code()), Ordering::SeqCst);
    }

    /// What asked for a stop, if anything did.
    pub fn raised(&self) -> Option<Signal> {
        match self.signal.load(Ordering::SeqCst) {
            130 => Some(Signal::Interrupt),
            143 => Some(Signal::Terminate),
            _ => None,
        }
    }
}
