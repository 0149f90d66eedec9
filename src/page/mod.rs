//! HTML pages that need no network and no server: the frame, tables, charts, safe text.

mod chart;

use serde_json::Value;

pub(crate) use chart::{Chart, Floor, Horizontal, Line, Unit};

/// A whole page. `title` is plain text, `body` is HTML, and `charts` are the charts in it.
pub(crate) fn document(title: &str, body: &str, charts: &[Chart]) -> String {
    let data: Vec<Value> = charts.iter().map(Chart::data).collect();
    // Within a script element only `<` could end it.
    let data = Value::from(data).to_string().replace('<', "\\u003c");
    format!(
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n\
         <meta name=viewport content=\"width=device-width, initial-scale=1\">\n\
         <meta name=color-scheme content=\"light dark\">\n\
         <meta http-equiv=Content-Security-Policy content=\"default-src 'none'; \
         style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n\
         <title>{title}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n{body}\
         </main>\n<script type=\"application/json\" id=data>{data}</script>\n\
         <script>\n{js}</script>\n</body>\n</html>\n",
        title = escaped(title),
        css = include_str!("page.css"),
        js = include_str!("page.js"),
    )
}

/// A section with a title; nothing without content.
pub(crate) fn section(title: &str, html: &str) -> String {
    if html.is_empty() {
        return String::new();
    }
    format!("<section>\n<h2>{title}</h2>\n{html}</section>\n")
}

/// A table with rows that are HTML already.
pub(crate) fn table(header: &[&str], rows: &str) -> String {
    let cells: String = header.iter().map(|name| format!("<th>{name}")).collect();
    let head = if cells.is_empty() {
        cells
    } else {
        format!("<thead><tr>{cells}</thead>\n")
    };
    format!("<div class=wide><table>\n{head}<tbody>\n{rows}</tbody></table></div>\n")
}

/// Text that came from outside, safe between tags and in quoted attributes. A control character
/// becomes the replacement character.
pub(crate) fn escaped(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => html.push_str("&amp;"),
            '<' => html.push_str("&lt;"),
            '>' => html.push_str("&gt;"),
            '"' => html.push_str("&quot;"),
            '\'' => html.push_str("&#39;"),
            '\n' | '\t' => html.push(c),
            c if c.is_control() => html.push('\u{fffd}'),
            c => html.push(c),
        }
    }
    html
}
